#include "signature.h"

#include <algorithm>
#include <cctype>
#include <set>
#include <sstream>
#include <stdexcept>

namespace metakern {

namespace {

bool is_name(char c) { return std::islower(static_cast<unsigned char>(c)) || c == '_'; }
bool is_size(char c) { return std::isupper(static_cast<unsigned char>(c)); }
bool is_digit(char c) { return std::isdigit(static_cast<unsigned char>(c)); }

// Characters of `text` from `at` for which `belongs`, which are passed over.
template <class F>
std::string take(const std::string& text, std::size_t& at, F belongs) {
    const std::size_t begin = at;
    while (at < text.size() && belongs(text[at])) ++at;
    return text.substr(begin, at - begin);
}

Argument argument(const std::string& text) {
    const auto refuse = [&] { throw std::invalid_argument("a signature has the argument '" + text + "', which can't be read"); };
    std::size_t at = 0;
    const auto next_is = [&](char c) { return at < text.size() && text[at] == c && (++at, true); };

    Argument read;
    const auto name = [](char c) { return is_name(c) || is_digit(c); };
    read.name = take(text, at, name);
    if (read.name.empty() || !next_is(':')) refuse();
    if (!next_is('*')) {
        while (at < text.size() && (is_digit(text[at]) || is_size(text[at]))) {
            const std::string times = take(text, at, is_digit);
            const bool sized = at < text.size() && is_size(text[at]);
            read.dims.emplace_back(times.empty() ? 1 : std::stoi(times), sized ? std::string(1, text[at++]) : "1");
        }
        if (read.dims.empty()) refuse();
    }
    read.indices = next_is('i');
    read.optional = next_is('?');
    if (read.optional) read.given_with = take(text, at, name);
    if (next_is('=')) {
        read.memory = take(text, at, name);
        if (read.memory.empty()) refuse();
    }
    if (at != text.size()) refuse();
    return read;
}

}  // namespace

Signature::Signature(const std::string& text) {
    std::istringstream words(text);
    std::set<std::string> seen;
    auto* side = &inputs;
    for (std::string word; words >> word;) {
        if (word == "->") {
            side = &outputs;
            continue;
        }
        side->push_back(argument(word));
        for (const auto& [times, size] : side->back().dims)
            if (size != "1") seen.insert(size);
        if (side->back().dims.empty()) seen.insert("*");
    }
    sizes = seen.size();
    const auto known = [&](const std::string& name) {
        return std::any_of(inputs.begin(), inputs.end(), [&](const Argument& input) { return input.name == name; });
    };
    for (const Argument& output : outputs)
        for (const std::string& name : {output.given_with, output.memory})
            if (!name.empty() && !known(name))
                throw std::invalid_argument("a signature names the input '" + name + "', which it does not have");
}

}  // namespace metakern

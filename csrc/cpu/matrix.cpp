// The tiles of matrix.h, and the batched product of product.h, for CPUs on which the library behind torch.bmm stays far
// below the machine's peak rate.
#include "matrix.h"

#include <utility>

#include "../parallel.h"
#include "../product.h"

namespace metakern::METAKERN_ISA {

namespace {

// kRows: the rows of a tile. kAccumulators: the vectors of sums that fit into the registers beside a panel's row and a
// broadcast element of A. AVX-512 and NEON have 32 registers, the others 16; for NEON neither GCC nor Clang keeps more than
// 20 sums in registers.
#if defined(__AVX512F__)
constexpr int kRows = 12, kAccumulators = 24;
#elif defined(__aarch64__)
constexpr int kRows = 5, kAccumulators = 20;
#else
constexpr int kRows = 6, kAccumulators = 12;
#endif

// The sums from which a tile takes long enough for its part of C to come from memory meanwhile.
constexpr int64_t kLongSum = 48;

// Computes a tile of R rows and P panels. A panel begins `next` elements after the one before.
template <class F, int R, int P, bool a_is_row_major>
inline void tile(const F* a, int64_t stride, const F* b, int64_t next, int64_t K, Output<F> c, int64_t width) {
    constexpr int V = P * kPanelVectors;
    if (K >= kLongSum)
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V && v * kLanes<F> < width; ++v) __builtin_prefetch(c.data + r * c.rows + v * kLanes<F>, 1);
    Vec<F> sum[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sum[r][v] = Vec<F>{};
    for (int64_t k = 0; k < K; ++k) {
        Vec<F> row[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v)
            row[v] = load(b + (v / kPanelVectors) * next + k * kPanel<F> + (v % kPanelVectors) * kLanes<F>);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec<F> x = splat(a_is_row_major ? a[r * stride + k] : a[k * stride + r]);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) sum[r][v] += x * row[v];
        }
    }
    // A full tile is stored without a check of each vector: for a small K the checks would cost too much.
    const auto finish = [&](auto adds, auto whole) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) {
                const int64_t j = v * kLanes<F>, left = width - j;
                if (!whole && left <= 0) continue;
                Vec<F> x = unfused(c.scale * sum[r][v]);
                if (adds) {
                    const F* add = c.add + r * c.add_rows + j;
                    x += whole || left >= kLanes<F> ? load(add) : load(add, left);
                }
                F* to = c.data + r * c.rows + j;
                if (whole || left >= kLanes<F>)
                    store(to, x);
                else
                    store(to, x, left);
            }
    };
    constexpr std::true_type yes;
    constexpr std::false_type no;
    const bool whole = width >= V * kLanes<F>;
    if (whole)
        c.add ? finish(yes, yes) : finish(no, yes);
    else
        c.add ? finish(yes, no) : finish(no, no);
}

// The panels of a tile of R rows: enough independent sums to hide the latency of an addition.
constexpr int panels_at_once(int R) {
    int P = 1;
    while (P < 4 && 2 * P * R * kPanelVectors <= kAccumulators) P *= 2;
    return P;
}

// Cache blocking: kDepth rows of kWide panels of B stay in the L2 cache while all rows of A are multiplied with them,
// and a strip of A stays in the L1 cache. What is read next is brought into the cache meanwhile: operands are large
// and mostly come from memory.
constexpr int64_t kDepth = 256, kWide = 8;
// While a row of B is packed, the row that comes so many rows later is brought into the cache.
constexpr int64_t kRowsAhead = 8;

// A part of a matrix that will be read soon: `count` runs of `size` elements, `stride` elements apart.
template <class F>
struct Ahead {
    const F* data;
    int64_t stride, count, size;

    // Rows [begin, begin + rows) of a, of K columns.
    static Ahead rows_of(Matrix<F> a, int64_t begin, int64_t rows, int64_t K) {
        const F* data = a.data + begin * a.rows;
        return a.columns == 1 ? Ahead{data, a.rows, rows, K} : Ahead{data, a.columns, rows ? K : 0, rows};
    }

    // Asks for part i of n to be brought into the L1 cache.
    void prefetch(int64_t i, int64_t n) const {
        for (int64_t run = count * i / n; run < count * (i + 1) / n; ++run) {
            const F* from = data + run * stride;
            for (int64_t at = 0; at < size; at += 64 / static_cast<int64_t>(sizeof(F))) __builtin_prefetch(from + at);
            __builtin_prefetch(from + size - 1);
        }
    }
};

// Computes R rows of C, and brings those of A that come next into the cache.
template <class F, int R, bool a_is_row_major>
void strip(const F* a, int64_t stride, const F* b, int64_t next, int64_t K, int64_t N, Output<F> c, Ahead<F> ahead) {
    constexpr int P = panels_at_once(R);
    const int64_t tiles = (N + P * kPanel<F> - 1) / (P * kPanel<F>);
    int64_t j = 0;
    for (int64_t i = 0; j + (P - 1) * kPanel<F> < N; ++i, j += P * kPanel<F>, b += P * next) {
        ahead.prefetch(i, tiles);
        tile<F, R, P, a_is_row_major>(a, stride, b, next, K, c.at(0, j), N - j);
    }
    for (; j < N; j += kPanel<F>, b += next) tile<F, R, 1, a_is_row_major>(a, stride, b, next, K, c.at(0, j), N - j);
}

// The functions for one number of rows.
template <class F>
struct Rows {
    void (*row_major)(const F*, int64_t, const F*, int64_t, int64_t, int64_t, Output<F>, Ahead<F>);
    void (*column_major)(const F*, int64_t, const F*, int64_t, int64_t, int64_t, Output<F>, Ahead<F>);
};
template <class F, std::size_t... r>
inline const Rows<F>& rows_of(int64_t rows, std::index_sequence<r...>) {
    static constexpr Rows<F> all[] = {{strip<F, r + 1, true>, strip<F, r + 1, false>}...};
    return all[rows - 1];
}

}  // namespace

template <class F>
void pack(F* to, Matrix<F> b, int64_t K, int64_t N, int64_t begin, int64_t end) {
    constexpr int64_t lanes = kLanes<F>;
    const int64_t whole = N / kPanel<F> < end ? N / kPanel<F> : end;
    if (b.columns == 1)
        for (int64_t k = 0; k < K; ++k)
            for (int64_t p = begin; p < whole; ++p) {
                const F* from = b.data + k * b.rows + p * kPanel<F>;
                for (int64_t v = 0; v < kPanelVectors; ++v) __builtin_prefetch(from + kRowsAhead * b.rows + v * lanes);
                std::memcpy(to + ((p - begin) * K + k) * kPanel<F>, from, kPanel<F> * sizeof(F));
            }
    for (int64_t p = b.columns == 1 && whole > begin ? whole : begin; p < end; ++p) {
        for (int64_t v = 0; v < kPanelVectors; ++v) {
            const int64_t j = p * kPanel<F> + v * lanes, width = N - j < lanes ? N - j : lanes;
            F* column = to + (p - begin) * K * kPanel<F> + v * lanes;
            if (width <= 0) {
                for (int64_t k = 0; k < K; ++k) store(column + k * kPanel<F>, Vec<F>{});
            } else if (b.columns == 1) {
                for (int64_t k = 0; k < K; ++k) store(column + k * kPanel<F>, load(b.data + k * b.rows + j, width));
            } else {
                const F* from = b.data + j * b.columns;
                int64_t k = 0;
                for (; k + lanes <= K; k += lanes) {
                    if (p + 1 < end)  // the columns that are packed after these
                        for (int64_t i = 0; i < lanes; ++i) __builtin_prefetch(from + (lanes + i) * b.columns + k);
                    Vec<F> block[lanes];
#pragma GCC unroll 16
                    for (int64_t i = 0; i < lanes; ++i)
                        block[i] = i < width ? load(from + i * b.columns + k) : Vec<F>{};
                    transpose<F>(block, std::make_index_sequence<lanes>());
#pragma GCC unroll 16
                    for (int64_t i = 0; i < lanes; ++i) store(column + (k + i) * kPanel<F>, block[i]);
                }
                for (; k < K; ++k)
                    for (int64_t i = 0; i < lanes; ++i)
                        column[k * kPanel<F> + i] = i < width ? from[i * b.columns + k * b.rows] : F(0);
            }
        }
    }
}

template <class F>
void multiply(int64_t M, int64_t N, int64_t K, Matrix<F> a, const F* b, Output<F> c, int64_t packed) {
    if (!packed) packed = K;
    const auto sizes = std::make_index_sequence<kRows>();
    const int64_t blocks = (M + kRows - 1) / kRows, wide = blocks > 1 ? kWide * kPanel<F> : N;
    int64_t k = 0;
    do {  // once where K = 0: the sums are empty
        const int64_t depth = K - k < kDepth ? K - k : kDepth;
        for (int64_t j = 0; j < N; j += wide)
            for (int64_t i = 0, block = 0; block < blocks; ++block) {
                const int64_t rows = (M - i) / (blocks - block), width = N - j < wide ? N - j : wide;
                const Rows<F>& run = rows_of<F>(rows, sizes);
                const F *from = a.data + i * a.rows + k * a.columns, *panel = b + j * packed + k * kPanel<F>;
                const int64_t blocks_left = blocks - block - 1, more = blocks_left ? (M - i - rows) / blocks_left : 0;
                const Ahead<F> ahead = Ahead<F>::rows_of({from, a.rows, a.columns}, rows, more, depth);
                (a.columns == 1 ? run.row_major : run.column_major)(
                    from, a.columns == 1 ? a.rows : a.columns, panel, packed * kPanel<F>, depth, width, c.at(i, j), ahead);
                i += rows;
            }
        k += kDepth;
        c.add = c.data;
        c.add_rows = c.rows;
    } while (k < K);
}

template void pack(float*, Matrix<float>, int64_t, int64_t, int64_t, int64_t);
template void pack(double*, Matrix<double>, int64_t, int64_t, int64_t, int64_t);
template void multiply(int64_t, int64_t, int64_t, Matrix<float>, const float*, Output<float>, int64_t);
template void multiply(int64_t, int64_t, int64_t, Matrix<double>, const double*, Output<double>, int64_t);

namespace {

// A unit of work has at most kMostRows rows. To give every thread some units, it may have fewer, but at least
// kLeastRows, so that packing B pays. A product of fewer than kSmall multiplications is not worth waking a thread.
constexpr int64_t kMostRows = 1024, kLeastRows = 96, kSmall = 1 << 17;

// Which rows or terms of a product count (product.h): all if `marks` is null. So do fewer than kShort in a row that need not:
// computing them is quicker than stopping for them.
constexpr int64_t kShort = kRows;
struct Marks {
    const int64_t* marks;
    int64_t ignored, count;

    // Calls run(i, j) for each range [i, j) that counts or, with `counts` false, for those in between.
    template <class Run>
    void each(bool counts, Run run) const {
        int64_t begin = 0, end = 0, next = kept_from(0);
        while (next < count) {
            begin = next;
            if (!counts && begin > end) run(end, begin);
            do {
                end = ignored_from(next);
                next = kept_from(end);
            } while (next < count && next - end < kShort);
            if (counts) run(begin, end);
        }
        if (!counts && end < count) run(end, count);
    }

    int64_t kept_from(int64_t i) const {
        while (marks && i < count && marks[i] == ignored) ++i;
        return i;
    }
    int64_t ignored_from(int64_t i) const {
        while (marks && i < count && marks[i] != ignored) ++i;
        return marks ? i : count;
    }
};

template <class F>
void product(const Product& p, int threads) {
    if (!p.M || !p.N) return;
    if (p.T * p.M * p.N * (p.K + 1) < kSmall) threads = 1;
    const Products<F> products{p.bfloat16};
    const int64_t wide = p.bfloat16 ? 2 * kWide : kWide;  // panels of bfloat16 take half of the cache
    const int64_t all = panels<F>(p.N), groups = (all + wide - 1) / wide, few = (p.M + kMostRows - 1) / kMostRows;
    const int64_t wanted = threads > 1 ? 4 * threads / (p.T * groups + 1) : 1, many = p.M / kLeastRows;
    const int64_t parts = wanted <= few || many <= few ? few : wanted < many ? wanted : many;
    parallel_for(p.T * groups * parts, threads, [&](int64_t unit) {
        const int64_t part = unit % parts, group = unit / parts % groups, t = unit / parts / groups;
        const int64_t begin = all * group / groups, end = all * (group + 1) / groups, j = begin * kPanel<F>;
        const int64_t first = p.M * part / parts, last = p.M * (part + 1) / parts;
        const int64_t width = (p.N < end * kPanel<F> ? p.N : end * kPanel<F>) - j;
        const F* a = static_cast<const F*>(p.a) + t * p.a_strides[0] + first * p.a_strides[1];
        const F* b = static_cast<const F*>(p.b) + t * p.b_strides[0];
        const F* add = static_cast<const F*>(p.add);
        const Marks of_rows{p.rows ? p.rows + t * p.M + first : nullptr, p.ignored, last - first};
        const Marks of_terms{p.terms ? p.terms + t * p.K : nullptr, p.ignored, p.K};
        F* packed = static_cast<F*>(thread_memory((end - begin) * kDepth * kPanel<F> * static_cast<int64_t>(sizeof(F))));
        Output<F> c{static_cast<F*>(p.c) + t * p.M * p.N, p.N, add ? add + t * p.add_strides[0] : add, p.add_strides[1],
                    static_cast<F>(p.scale)};
        c = c.at(first, j);
        const Output<F> nothing = c;
        bool is_empty = true;
        const auto add_terms = [&](int64_t k, int64_t depth) {
            const Matrix<F> rows{a + k * p.a_strides[2], p.a_strides[1], p.a_strides[2]};
            Ahead<F>::rows_of(rows, 0, last - first < kRows ? last - first : kRows, depth).prefetch(0, 1);
            products.pack(packed, {b + k * p.b_strides[1], p.b_strides[1], p.b_strides[2]}, depth, p.N, begin, end);
            of_rows.each(true, [&](int64_t i, int64_t i_end) {
                products.multiply(i_end - i, width, depth, {rows.data + i * rows.rows, rows.rows, rows.columns}, packed, c.at(i, 0));
            });
            c.add = c.data;
            c.add_rows = c.rows;
            is_empty = false;
        };
        of_terms.each(true, [&](int64_t k, int64_t k_end) {
            for (; k < k_end; k += kDepth) add_terms(k, k_end - k < kDepth ? k_end - k : kDepth);
        });
        const auto add_nothing = [&](int64_t i, int64_t i_end) {
            products.multiply(i_end - i, width, 0, {a, p.a_strides[1], p.a_strides[2]}, packed, nothing.at(i, 0));
        };
        is_empty ? add_nothing(0, last - first) : of_rows.each(false, add_nothing);
    });
}

}  // namespace

extern const ProductKernels product_kernels = {{product<float>, product<double>}};

}  // namespace metakern::METAKERN_ISA

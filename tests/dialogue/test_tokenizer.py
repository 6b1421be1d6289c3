"""The tokenizer: texts are decoded unchanged, labels are those of replies, and damaged files are refused."""

import hashlib
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metakern.dialogue.readers import Turn, read
from metakern.dialogue.tokenizer import IGNORE, SPECIAL_TOKENS, Tokenizer, bot_of
from metakern.errors import CheckpointError, DataError
from metakern.io import cache_folder

TOPICS = Path(__file__).parent / "data" / "topics.jsonl"
DIALOGUES = read(str(TOPICS))
TOKENIZER = Tokenizer.train(DIALOGUES, 320)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)))


def same(a: Tokenizer, b: Tokenizer) -> bool:
    """Return whether two tokenizers have the same vocabulary."""
    return [a.token(i) for i in range(a.vocab_size)] == [b.token(i) for i in range(b.vocab_size)]


@given(TEXTS | st.sampled_from(SPECIAL_TOKENS).map(lambda token: f"say {token} twice {token}"))
def test_texts_are_decoded_unchanged_and_never_become_special_tokens(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not set(ids) & set(range(len(SPECIAL_TOKENS)))


@pytest.mark.parametrize("text", ["hi", "привет", "\N{GRINNING FACE} ok"])
def test_the_size_of_a_cut_character_is_that_of_its_bytes(text):
    ids = TOKENIZER.encode(text)
    sizes = [TOKENIZER.size(ids[:i]) for i in range(len(ids) + 1)]
    assert sizes[-1] == len(text.encode()) == TOKENIZER.size([TOKENIZER.bos_id, *ids, TOKENIZER.eos_id])
    assert all(a < b for a, b in itertools.pairwise(sizes))
    assert sizes == [len(b"".join(_bytes_of(index) for index in ids[:i])) for i in range(len(ids) + 1)]


def _bytes_of(index: int) -> bytes:
    """The bytes of a token, by GPT-2's alphabet of bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return bytes(alphabet[character] for character in TOKENIZER.token(index))


def test_special_tokens_are_left_out_of_decoded_text():
    ids = [TOKENIZER.bos_id, TOKENIZER.bot_id, *TOKENIZER.encode("hi"), TOKENIZER.eos_id, TOKENIZER.pad_id]
    assert TOKENIZER.decode(ids) == "hi"
    assert [TOKENIZER.token(i) for i in range(6)] == list(SPECIAL_TOKENS)


def test_training_is_deterministic_and_gives_at_most_the_size():
    assert same(Tokenizer.train(DIALOGUES, 320), TOKENIZER)
    assert TOKENIZER.vocab_size == 320
    assert Tokenizer.train(DIALOGUES[:1], 4096).vocab_size < 4096
    merges = "".join(TOKENIZER.token(i) + "\n" for i in range(262, 320))
    assert hashlib.sha256(merges.encode()).hexdigest()[:16] == "4f5760cea5eda085"


def test_a_saved_tokenizer_is_read_back_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "run" / "tokenizer.json"
    TOKENIZER.save(path)
    loaded = Tokenizer.load(path)
    assert same(loaded, TOKENIZER)
    assert loaded.encode("<eos>") == TOKENIZER.encode("<eos>") != [loaded.eos_id]
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    whole = path.read_text("utf-8")
    for content in (whole[: len(whole) // 2].encode(), b"", b"{}", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"tokenizer\.json: ") as excinfo:
            Tokenizer.load(path)
        assert "\n" not in str(excinfo.value)
    other = json.loads(whole)
    other["added_tokens"] = [token for token in other["added_tokens"] if token["content"] != "<bot>"]
    del other["model"]["vocab"]["<bot>"]
    path.write_text(json.dumps(other), "utf-8")
    with pytest.raises(DataError, match="lacks <bot>"):
        Tokenizer.load(path)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        Tokenizer.load(tmp_path / "nowhere.json")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        TOKENIZER.save(path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("tokenizer.json", "old")]


def test_trained_tokenizers_are_cached_by_texts_and_size_and_damaged_caches_ignored(tmp_path, monkeypatch):
    Tokenizer.train(DIALOGUES, 300, tmp_path)
    Tokenizer.train(DIALOGUES, 310, tmp_path)
    Tokenizer.train(DIALOGUES[1:], 300, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    for file in files:
        stored = json.loads(file.read_text("utf-8"))
        merges = stored["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]
        file.write_text(json.dumps(stored), "utf-8")
    assert same(Tokenizer.train(DIALOGUES, 300, tmp_path), Tokenizer.train(DIALOGUES, 300))

    def untouched(*_, **__):
        raise AssertionError("trained although cached")

    monkeypatch.setattr("tokenizers.trainers.BpeTrainer", untouched)
    assert Tokenizer.train(DIALOGUES, 300, tmp_path).vocab_size == 300


def test_a_cache_that_cannot_be_made_is_no_reason_to_stop(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert Tokenizer.train(DIALOGUES, 300, tmp_path / "file" / "cache").vocab_size == 300
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError))
    assert Tokenizer.train(DIALOGUES, 300, cache_folder()).vocab_size == 300


def test_bad_arguments():
    with pytest.raises(ValueError, match="vocab_size must be at least 262, got 100"):
        Tokenizer.train(DIALOGUES, 100)
    with pytest.raises(DataError, match="must hold a text, got none"):
        Tokenizer.train([])
    with pytest.raises(ValueError, match="train_on must be bot or all, got 'me'"):
        TOKENIZER.encode_dialogue(DIALOGUES[0].turns, "me")
    with pytest.raises(ValueError, match="max_length must be at least 4, got 3"):
        TOKENIZER.encode_dialogue(DIALOGUES[0].turns, max_length=3)


def test_roles_and_labels():
    turns = (Turn("system", "S"), Turn("ann", "A"), Turn("bob", "B"), Turn("tool", "T"), Turn("eve", "E"))

    def spelled(ids: list[int]) -> str:
        return "".join(TOKENIZER.token(i) if i != IGNORE else "." for i in ids)

    ids, labels = TOKENIZER.encode_dialogue(turns, "bot", 64, "bob")
    assert spelled(ids) == "<bos><system>S<eos><user>A<eos><bot>B<eos><system>T<eos><user>E<eos>"
    assert spelled(labels) == "........B<eos>......"
    assert spelled(TOKENIZER.encode_dialogue(turns, "all", 64, "bob")[1]) == ".....A<eos>.B<eos>....E<eos>"
    assert spelled(TOKENIZER.encode_dialogue(turns, "bot", 64, "eve")[1]) == ".............." + "E<eos>"
    assert TOKENIZER.encode_dialogue(turns, "bot", 64) == (ids, labels)
    assert spelled(TOKENIZER.prompt(turns[:2], 64, "bob")) == "<bos><system>S<eos><user>A<eos><bot>"


def test_the_bot_is_the_speaker_with_that_role_or_the_second_one():
    assert bot_of([Turn("system", ""), Turn("x", ""), Turn("y", ""), Turn("x", "")]) == "y"
    assert bot_of([Turn("assistant", ""), Turn("user", "")]) == "assistant"
    assert bot_of([Turn("x", "")]) is None


SPEECH = st.lists(
    st.tuples(st.sampled_from(["ann", "bob", "system"]), st.text("abc d", min_size=1, max_size=40)), min_size=2
)


@given(SPEECH, st.integers(4, 40), st.sampled_from(["bot", "all"]))
def test_labels_are_aligned_and_a_reply_is_always_there(speech, max_length, train_on):
    turns = [Turn(*turn) for turn in speech]
    ids, labels = TOKENIZER.encode_dialogue(turns, train_on, max_length, "bob")
    assert len(ids) == len(labels) <= max_length
    assert ids[0] == TOKENIZER.bos_id
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))
    learned = {"bob"} if train_on == "bot" else {"ann", "bob"}
    assert any(label != IGNORE for label in labels) == any(turn.speaker in learned for turn in turns)
    full_ids, full_labels = TOKENIZER.encode_dialogue(turns, train_on, 100_000, "bob")
    assert [i for i in full_labels if i != IGNORE] == [
        i for turn in turns if turn.speaker in learned for i in [*TOKENIZER.encode(turn.text), TOKENIZER.eos_id]
    ]
    if full_labels.index(next((i for i in full_labels if i != IGNORE), IGNORE)) <= max_length // 2:
        assert (ids, labels) == (full_ids[:max_length], full_labels[:max_length])


@given(SPEECH, st.integers(4, 40))
def test_a_prompt_ends_with_the_bot_token_and_leaves_half_of_the_window(speech, max_length):
    turns = [Turn(*turn) for turn in speech]
    ids = TOKENIZER.prompt(turns, max_length, "bob")
    assert ids[0] == TOKENIZER.bos_id
    assert ids[-1] == TOKENIZER.bot_id
    assert 2 < len(ids) <= max(max_length // 2, 3)

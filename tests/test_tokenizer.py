"""models/parts/tokenizer.py against the tokenizers library, on tokenizers trained here on a few sentences."""
import json
import random
import time
import unicodedata

import pytest

from models.parts import Invalid
from models.parts.tokenizer import PATTERNS, Tokenizer, split

# As published; the module's own spelling is not used here.
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3 = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
          r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""")
QWEN2 = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"""
         r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""")

ASSIGNED = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]
CORPUS = """The quick brown fox jumps over the lazy dog; it's what they'd've said, isn't it?
We'll meet at 10:45 on 3 March 2021, or at 1,234,567 o'clock.\r\n\r\n\tIndented   text, then   spaces.
那只敏捷的棕色狐狸跳过了懒狗。今天天气很好，我们去公园散步吧！你好，世界。你好，朋友。
Привет, мир! Как дела? Γειά σου Κόσμε. مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก
안녕하세요 세계 こんにちは世界 café naïve Zürich ẞ ŉ ｆｕｌｌ ＷＩＤＴＨ １２３ ½ Ⅷ ² 😀😀👍🏽👨‍👩‍👧 🇩🇪 <s> hello </s> the the the""".split("\n") * 3
WORDS = [" ", "  ", "\n", "\r\n", "\t", "\u3000", "\xa0", "\x1c", "'s", "'LL", "'ſ", "'re", "▁", "▁▁", "<s>", "</s>", "<unk>", "<0x41>",
         "the", "The ", " the", "你好", "世界", "12345", "1", "😀", "👨‍👩‍👧", "e\u0301", "\u200f", "مرحبا", "<word>", "<both>", "..."]


def texts(n, seed=0):
    """Random strings over every assigned code point, over corpus characters and over WORDS, mixed."""
    r = random.Random(seed)
    corpus = "".join(CORPUS)
    blocks = [ASSIGNED[i:i + 300] for i in range(0, 24000, 300)] + [ASSIGNED[-6000:-5700]]

    def part():
        kind = r.randrange(6)
        if kind == 0:
            return "".join(r.choices(ASSIGNED, k=r.randrange(1, 6)))
        if kind == 1:
            return "".join(r.choices(r.choice(blocks), k=r.randrange(1, 8)))
        if kind == 2:
            start = r.randrange(len(corpus))
            return corpus[start:start + r.randrange(1, 30)]
        if kind == 3:
            return "".join(r.choices(ASSIGNED[:128], k=r.randrange(1, 8)))
        return "".join(r.choices(WORDS, k=r.randrange(1, 5)))

    return ["".join(part() for _ in range(r.randrange(1, 8))) for _ in range(n)]


# ------------------------------------------------------------------------------------------------ trained in the test


def trained(kind):
    """A tokenizer of the library, trained on CORPUS: (library's, ours)."""
    pytest.importorskip("tokenizers")
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Library

    byte_level = kind in ("gpt2", "llama3", "qwen2")
    fallback = kind in ("prepend", "metaspace")
    lib = Library(models.BPE(byte_fallback=fallback, unk_token=None if byte_level else "<unk>", fuse_unk=kind in ("prepend", "unknown"),
                             ignore_merges=kind == "llama3"))
    alphabet = []
    if kind == "gpt2":
        lib.pre_tokenizer, lib.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    elif byte_level:
        if kind == "qwen2":
            lib.normalizer = normalizers.NFC()
        lib.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex({"llama3": LLAMA3, "qwen2": QWEN2}[kind]), "isolated" if kind == "llama3" else "removed",
                                 invert=kind != "llama3"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        lib.decoder = decoders.ByteLevel()
    elif kind == "prepend":  # as Llama 2 and MiniCPM: no cut between words
        lib.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        lib.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    else:
        scheme = {"metaspace": "first", "unknown": "always", "whole": "never"}[kind]
        lib.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=kind != "whole")
        lib.decoder = decoders.Metaspace("▁", prepend_scheme=scheme)
    if byte_level:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] * fallback
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    if kind == "prepend":  # merges across words, as in a file whose spaces are ordinary characters
        lib.train_from_iterator([line[i:i + 40] for line in CORPUS for i in range(0, len(line), 20)], trainer)
    else:
        lib.train_from_iterator(CORPUS, trainer)
    lib.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    spec = json.loads(lib.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    lib = Library.from_str(json.dumps(spec))
    lib.add_tokens([AddedToken("<word>", single_word=True, normalized=False), AddedToken("<both>", lstrip=True, rstrip=True),
                    AddedToken("the quick"), AddedToken("quick brown fox", normalized=False)])
    return lib, Tokenizer(json.loads(lib.to_str()))


KINDS = ("gpt2", "llama3", "qwen2", "prepend", "metaspace", "unknown", "whole")


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    return trained(request.param)


def comparable(ours, strings):
    """Without the combining marks that the library's NFC does not know, its table being of Unicode 9."""
    if not any(step["type"] == "NFC" for step in ours.normalizers):
        return strings
    from tokenizers import normalizers
    theirs = normalizers.NFD().normalize_str
    newer = {c for c in ASSIGNED if unicodedata.combining(c) and theirs(c + "\u0334") != unicodedata.normalize("NFD", c + "\u0334")}
    assert len(newer) < 300
    return ["".join(c for c in text if c not in newer) for text in strings]


def test_ids_and_pieces_equal_the_library_on_2000_random_strings(pair):
    lib, ours = pair
    strings = comparable(ours, texts(2000))
    names = {i: piece for piece, i in lib.get_vocab().items()}
    for special in (False, True):
        lib.encode_special_tokens = not special
        for text in strings:
            expected = lib.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, special=special) == expected, text
            assert ours.pieces(text, special=special) == [names[i] for i in expected], text


def test_template_and_decoding_equal_the_library(pair):
    lib, ours = pair
    lib.encode_special_tokens = True
    r = random.Random(2)
    left_out = {token["id"] for token in ours.normal_tokens.values()}  # the library shows their normalised form
    for text in comparable(ours, texts(150, seed=2)) + ["", " ", "  a  "]:
        expected = lib.encode(text).ids
        assert ours.encode(text, template=True) == expected == [1, *ours.encode(text), 2]
        ids = [i for i in expected + r.choices(range(300), k=5) if i not in left_out]
        for special in (False, True):
            assert ours.decode(ids, special=special) == lib.decode(ids, skip_special_tokens=not special), text


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "prepend"])
def test_decode_gives_the_text_back(kind):
    ours = trained(kind)[1]
    for text in texts(300, seed=3):
        for word in ("▁", "<both>", "<word>", "the quick", "quick brown fox"):  # the marker; added tokens take a space in
            text = text.replace(word, "")
        text = text.lstrip(" ")
        assert ours.decode(ours.encode(text)) == (" " if kind == "gpt2" and text else "") + text


def test_patterns_cut_every_kind_of_character_as_the_library_does():
    pytest.importorskip("tokenizers")
    from tokenizers import Regex, pre_tokenizers
    kind = [unicodedata.category(c) for c in map(chr, range(0x110000))] + [""]
    edges = [c for c in ASSIGNED if ord(c) % 64 == 0 or ord(c) < 0x250 or not kind[ord(c) - 1] == kind[ord(c)] == kind[ord(c) + 1]]
    for published in (GPT2, QWEN2, LLAMA3):
        lib = pre_tokenizers.Split(Regex(published), "isolated")
        for at in range(0, len(edges), 500):
            text = "".join(f"a{c}b 1{c}2 '{c}\r{c}{c} {c}\n!{c} '{c}x " for c in edges[at:at + 500])
            assert split(text, published) == [word for word, _ in lib.pre_tokenize_str(text)]


# ------------------------------------------------------------------------------------------------ without the library


def small(vocab="", merges=(), **parts):
    """A tokenizer.json as a dictionary: one id per word of `vocab`, in order."""
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(vocab.split())}, "merges": list(merges)}
    model |= parts.pop("model", {})
    return {"model": model, **parts}


def added(content, i, **flags):
    return {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True,
            "content": content, "id": i, **flags}


def test_merges_are_read_in_both_spellings_and_applied_by_rank_then_from_the_left():
    for merges in (["b c", "a b", "a a"], [["b", "c"], ["a", "b"], ["a", "a"]]):
        ours = Tokenizer(small("a b c ab bc aa", merges))
        assert ours.pieces("abcabaaa") == ["a", "bc", "ab", "aa", "a"]


def test_an_out_of_order_list_of_merges_gives_the_library_s_ids():
    tokenizers = pytest.importorskip("tokenizers")
    r = random.Random(0)
    for _ in range(150):
        vocab, merges = list("abcd"), []
        for _ in range(r.randrange(3, 40)):
            pair = r.choices(vocab, k=2)
            if len("".join(pair)) <= 8:
                merges.append(pair)
                vocab += ["".join(pair)] * ("".join(pair) not in vocab)
        r.shuffle(merges)
        spec = small(" ".join(vocab), merges)
        lib, ours = tokenizers.Tokenizer.from_str(json.dumps(spec)), Tokenizer(spec)
        for _ in range(20):
            text = "".join(r.choices("abcd", weights=(4, 3, 2, 1), k=r.randrange(40)))
            assert ours.encode(text) == lib.encode(text).ids, (spec, text)


def test_unknown_characters_are_fused_kept_apart_dropped_or_written_as_bytes():
    tokenizers = pytest.importorskip("tokenizers")
    vocab = "<unk> a b <0xC3> <0xA9> <0xE4> <0xBD>"  # bytes of é, and a part of those of 你
    for unk in ("<unk>", None):
        for fuse in (False, True):
            for fallback in (False, True):
                spec = small(vocab, model={"unk_token": unk, "fuse_unk": fuse, "byte_fallback": fallback})
                lib, ours = tokenizers.Tokenizer.from_str(json.dumps(spec)), Tokenizer(spec)
                assert ours.unk_id == (0 if unk else None)
                for text in ("axyb", "xx", "éa", "x你é你a", "你éé", "axéy", ""):
                    assert ours.encode(text) == lib.encode(text).ids, (unk, fuse, fallback, text)


def test_ignore_merges_takes_a_whole_word_and_other_words_are_merged():
    spec = small("a b c ab abc", ["a b"], model={"ignore_merges": True})
    assert Tokenizer(spec).pieces("abc") == ["abc"] and Tokenizer(spec).pieces("abca") == ["ab", "c", "a"]
    spec["model"]["ignore_merges"] = False
    assert Tokenizer(spec).pieces("abc") == ["ab", "c"]


def test_user_text_never_turns_into_special_ids_unless_asked():
    ours = Tokenizer(small("< s > a", added_tokens=[added("<s>", 4), added("<s><s>", 5), added("a<", 6, special=False)]))
    assert ours.encode("<s>a") == [0, 1, 2, 3]
    assert ours.encode("<s><s><s>a", special=True) == [5, 4, 3]
    assert ours.encode("a<s>") == ours.encode("a<s>", special=True) == [6, 1, 2]  # the leftmost wins, and a< is ordinary
    assert ours.id("<s>") == 4 and ours.vocab["<s>"] == 4 and ours.id("none") is None
    assert ours.decode([4, 3]) == "a" and ours.decode([4, 3], special=True) == "<s> a"


def test_flags_of_added_tokens_equal_the_library():
    tokenizers = pytest.importorskip("tokenizers")
    r = random.Random(4)
    for case in range(60):
        flags = [{k: r.random() < 0.5 for k in ("single_word", "lstrip", "rstrip", "normalized", "special")} for _ in range(3)]
        tokens = [added(t, 20 + i, **f) for i, (t, f) in enumerate(zip(("ab", "<s>", "b c"), flags))]
        spec = small("<unk> a b c < s > ▁ \u00e9", added_tokens=tokens, model={"unk_token": "<unk>"}, version="1.0",
                     normalizer={"type": "Replace", "pattern": {"String": "x"}, "content": "a"},
                     pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": ("first", "always", "never")[case % 3]})
        for i, token in enumerate(tokens):  # the library counts on from the model's vocabulary
            token["id"] = len(spec["model"]["vocab"]) + i
        lib, ours = tokenizers.Tokenizer.from_str(json.dumps(spec)), Tokenizer(spec)
        for _ in range(40):
            text = "".join(r.choices(["ab", "<s>", "b c", "xb", "x", " ", "  ", "_", "é", "\u0301", "²", "\u200d", "\x1c", "\u2028"], k=6))
            for special in (False, True):
                lib.encode_special_tokens = not special
                assert ours.encode(text, special=special) == lib.encode(text).ids, (flags, text)


def test_old_metaspace_files_say_add_prefix_space():
    for says, expected in ((True, ["▁", "a", "▁", "b"]), (False, ["a", "▁", "b"])):
        spec = small("a b ▁", pre_tokenizer={"type": "Metaspace", "replacement": "▁", "add_prefix_space": says})
        assert Tokenizer(spec).pieces("a b") == expected


def test_nothing_is_put_in_front_of_nothing():
    steps = [{"type": "Replace", "pattern": {"String": "x"}, "content": ""}, {"type": "Prepend", "prepend": "▁"}]
    ours = Tokenizer(small("a ▁", normalizer={"type": "Sequence", "normalizers": steps}))
    assert ours.encode("") == ours.encode("x") == [] and ours.pieces("ax") == ["▁", "a"]


def test_named_cases_separators_and_surrogates():
    assert set(PATTERNS) == {GPT2, LLAMA3, QWEN2}
    assert split("'ſt 12345", LLAMA3) == ["'ſ", "t", " ", "123", "45"] and split("'ſt", GPT2) == ["'", "ſt"]
    assert split("a\x1c\x1d b\x1e\x1f", LLAMA3) == ["a", "\x1c\x1d", " b", "\x1e\x1f"]  # not white space
    assert split("a\x85\u2028b", LLAMA3) == ["a", "\x85", "\u2028b"]  # white space, but no newline
    ours = Tokenizer(small("a"))
    with pytest.raises(Invalid, match=r"character 3 of the text is U\+D83D"):
        ours.encode("aaa\ud83d")


# ------------------------------------------------------------------------------------------------ refusals, cost


def test_what_is_not_supported_is_named():
    split_step = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    cases = {
        "WordPiece": {"model": {"type": "WordPiece", "vocab": {}}},
        "does not say model": {"vocab": {}},
        "dropout is 0.1": small(model={"dropout": 0.1}),
        "end_of_word_suffix is '</w>'": small(model={"end_of_word_suffix": "</w>"}),
        "continuing_subword_prefix is '##'": small(model={"continuing_subword_prefix": "##"}),
        "normalizer type is 'Lowercase'": small(normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}),
        r"normalizer Replace pattern is \['Regex'\]": small(normalizer={"type": "Replace", "pattern": {"Regex": "a"}, "content": ""}),
        "pre_tokenizer type is 'Digits'": small(pre_tokenizer={"type": "Sequence", "pretokenizers": [split_step, {"type": "Digits"}]}),
        r"Split pattern is '\\\\w\+'": small(pre_tokenizer={**split_step, "pattern": {"Regex": r"\w+"}}),
        "Split pattern is {'String': ' '}": small(pre_tokenizer={**split_step, "pattern": {"String": " "}}),
        "MergedWithNext": small(pre_tokenizer={**split_step, "behavior": "MergedWithNext"}),
        "decoder type is 'WordPiece'": small(decoder={"type": "WordPiece"}),
        "post_processor type is 'BertProcessing'": small(post_processor={"type": "BertProcessing"}),
        "'ab' occurs in a merge": small("a b", ["a b"]),
        "'<unk>' occurs in a merge or as unknown": small("a", model={"unk_token": "<unk>"}),
        "merges must be pairs": small("a b", ["a b c"]),
    }
    for message, spec in cases.items():
        with pytest.raises(Invalid, match=message):
            Tokenizer(spec)
    with pytest.raises(Invalid, match="no token with id 7"):
        Tokenizer(small("a b")).decode([0, 7])


def test_a_path_is_read_and_a_bad_file_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(small("a 你")), encoding="utf-8")
    assert Tokenizer(path).encode("你a") == Tokenizer(str(path)).encode("你a") == [1, 0]
    path.write_text("{")
    for name in ("tokenizer.json", "none.json"):
        with pytest.raises(Invalid, match=name):
            Tokenizer(tmp_path / name)


@pytest.mark.parametrize("kind", ["llama3", "prepend"])
def test_100k_characters_cost_less_than_15_times_10k(kind):
    ours = trained(kind)[1]
    r = random.Random(5)
    words = "".join(r.choices(" ".join(CORPUS).split(" "), k=40000)), " ".join(r.choices(" ".join(CORPUS).split(" "), k=40000))
    for text in (*words, "e" * 100_000):
        def cost(n):
            ours.cache.clear()
            start = time.process_time()
            ours.encode(text[:n])
            return time.process_time() - start
        assert len(text) >= 100_000
        assert min(cost(100_000) for _ in range(2)) < 15 * min(cost(10_000) for _ in range(4)), text[:20]


def test_a_full_cache_starts_over(monkeypatch):
    from models.parts import tokenizer
    monkeypatch.setattr(tokenizer, "CACHED_WORDS", 2)
    ours = Tokenizer(small("a b ▁", pre_tokenizer={"type": "Metaspace", "replacement": "▁"}))
    for text in ("a b ab ba a b", "b a"):
        assert ours.pieces(text) == [c for c in "▁" + text.replace(" ", "▁")]
        assert len(ours.cache) <= 2

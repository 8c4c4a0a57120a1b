"""models/parts/sentencepiece.py against the sentencepiece library, on models trained here on a few sentences."""
import io
import random
import time

import pytest

from models.parts import Invalid
from models.parts.sentencepiece import SentencePiece, children
from tests.test_tokenizer import CORPUS, texts


def trained(**options):
    """A model of the library, trained on CORPUS: (library's, ours)."""
    library = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 500, "character_coverage": 0.98, "hard_vocab_limit": False, **options}
    library.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS * 3), model_writer=out, minloglevel=9, num_threads=1, **options)
    return library.SentencePieceProcessor(model_proto=out.getvalue()), SentencePiece(out.getvalue())


KINDS = {
    "bpe nfkc": {},
    "bpe identity bytes": {"normalization_rule_name": "identity", "byte_fallback": True, "remove_extra_whitespaces": False},
    "bpe nfkc_cf bytes defined": {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": True,
                                 "user_defined_symbols": ["the", "▁the", "hello", "<word>", "你好", "  ", "ab"], "control_symbols": ["<both>"]},
    "bpe bare": {"add_dummy_prefix": False, "normalization_rule_name": "nfkc", "bos_id": -1, "eos_id": -1, "pad_id": 1},
    "unigram nfkc": {"model_type": "unigram", "bos_id": 0, "eos_id": 1, "unk_id": 2},
    "unigram identity bytes": {"model_type": "unigram", "normalization_rule_name": "identity", "byte_fallback": True},
    "unigram spaces": {"model_type": "unigram", "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "unigram defined": {"model_type": "unigram", "user_defined_symbols": ["the", "▁the", "hello", "<word>", "你好", "  ", "."],
                        "control_symbols": ["<both>"], "unk_surface": "?"},
    "bpe suffix": {"treat_whitespace_as_suffix": True},
    "unigram suffix": {"model_type": "unigram", "treat_whitespace_as_suffix": True, "remove_extra_whitespaces": False},
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    return trained(**KINDS[request.param])


def test_ids_and_pieces_equal_the_library_on_2000_random_strings(pair):
    lib, ours = pair
    named = ["", " ", "   ", "\u3000 ", "▁", " ▁ ", "\x00", "\x01 ", "a\x00b", "\ufeff", "\u200b", "\x1c a\x1f", "ﷺ", "e\u0301" * 3]
    for n, text in enumerate(named + texts(2000)):
        assert ours.encode(text) == lib.encode(text), repr(text)
        if n < 500:
            assert ours.normalize(text) == lib.normalize(text), repr(text)
            assert ours.pieces(text) == lib.encode(text, out_type=str), repr(text)


def test_special_ids_lookup_and_length_equal_the_library(pair):
    lib, ours = pair
    assert len(ours) == len(lib)
    assert ours.unk_id == lib.unk_id()
    for theirs, own in ((lib.bos_id(), ours.bos_id), (lib.eos_id(), ours.eos_id), (lib.pad_id(), ours.pad_id)):
        assert own == (None if theirs == -1 else theirs)
    for piece in [lib.id_to_piece(i) for i in range(len(lib))] + ["no such piece", ""]:
        assert ours.id(piece) == lib.piece_to_id(piece)


def test_decoding_equals_the_library(pair):
    lib, ours = pair
    r = random.Random(6)
    for text in texts(150, seed=6):
        ids = lib.encode(text)
        for some in (ids, r.choices(range(len(lib)), k=12), ids[:3] + [ours.unk_id] * 2 + ids[-3:], [i for i in ids if i > 2]):
            assert ours.decode(some) == lib.decode(some), some
    assert ours.decode([]) == ""
    with pytest.raises(Invalid, match="no piece with id 99999"):
        ours.decode([0, 99999])


def test_control_symbols_never_come_from_text():
    for kind in ("bpe", "unigram"):
        lib, ours = trained(model_type=kind, control_symbols=["<both>", "Q"], user_defined_symbols=["<word>"])
        for text in ("<both>", "<s></s><unk>", "Q", "a Q b", "<word>"):
            assert not {ours.id(p) for p in ("<both>", "Q", "<s>", "</s>")} & set(ours.encode(text))
            assert ours.encode(text) == lib.encode(text)
        assert "<word>" in ours.pieces("a<word>b")


def built(pieces, model_type=1, **normalizer):
    """A model file made by hand: unknown, begin and end, then (piece, score, type)."""
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    for piece, score, kind in [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), *pieces]:
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = model_type
    for key, value in {"add_dummy_prefix": False, **normalizer}.items():
        setattr(proto.normalizer_spec, key, value)
    return proto


@pytest.mark.parametrize("model_type", [1, 2])
def test_equal_scores_are_broken_as_the_library_breaks_them(model_type):
    library = pytest.importorskip("sentencepiece")
    r = random.Random(7)
    for _ in range(60):
        pieces = {c: (c, r.choice((-3.0, -2.5, -0.1)), 1) for c in "abc"}
        for _ in range(r.randrange(2, 25)):
            piece = "".join(r.choices("abcd", k=r.randrange(2, 6)))
            pieces[piece] = piece, r.choice((-5.0, -4.3, -4.0, -1.5, 0.7)), 4 if r.random() < 0.1 else 1
        model = built(pieces.values(), model_type).SerializeToString()
        lib, ours = library.SentencePieceProcessor(model_proto=model), SentencePiece(model)
        for _ in range(25):
            text = "".join(r.choices("abcd ", weights=(5, 5, 3, 1, 1), k=r.randrange(30)))
            assert ours.encode(text) == lib.encode(text), (pieces, text)


def test_every_combination_of_space_settings():
    library = pytest.importorskip("sentencepiece")
    for n in range(16):
        proto = built([("▁", -2, 1), ("a", -2, 1), ("▁a", -3, 1), ("a▁", -3.5, 1), (" ", -3, 1), ("  ", 0, 4), ("▁▁", -3, 1)],
                      add_dummy_prefix=bool(n & 1), remove_extra_whitespaces=bool(n & 2), escape_whitespaces=bool(n & 4))
        proto.trainer_spec.treat_whitespace_as_suffix = bool(n & 8)
        model = proto.SerializeToString()
        lib, ours = library.SentencePieceProcessor(model_proto=model), SentencePiece(model)
        for text in ("", " ", "  ", "   ", "a", " a ", "  a   a  ", "a  a", "▁a▁ ▁", "a   ", "   a"):
            assert ours.normalize(text) == lib.normalize(text), (n, text)
            assert ours.encode(text) == lib.encode(text), (n, text)
            assert ours.decode(ours.encode(text)) == lib.decode(lib.encode(text)), (n, text)


def test_a_long_text_is_summed_like_the_library():
    lib, ours = trained(model_type="unigram")
    text = " ".join(random.Random(8).choices(" ".join(CORPUS).split(" "), k=25_000))
    assert ours.encode(text) == lib.encode(text)


# ------------------------------------------------------------------------------------------------ refusals, cost


def test_what_is_not_supported_or_damaged_is_named(tmp_path):
    proto = built([("a", -1, 1)])
    for change, message in ((lambda p: setattr(p.trainer_spec, "model_type", 3), "model type 3"),
                            (lambda p: setattr(p.pieces[3], "type", 5), "1 unused pieces"),
                            (lambda p: setattr(p.denormalizer_spec, "precompiled_charsmap", b"1234"), "4 bytes of rules"),
                            (lambda p: setattr(p.pieces[0], "type", 1), "0 of 4 pieces are of type unknown"),
                            (lambda p: setattr(p.trainer_spec, "byte_fallback", True), "0x00"),
                            (lambda p: setattr(p.normalizer_spec, "precompiled_charsmap", b"\x00\x04\0\0" + b"a" * 99), "cannot be read")):
        other = type(proto)()
        other.CopyFrom(proto)
        change(other)
        with pytest.raises(Invalid, match=message):
            SentencePiece(other.SerializeToString())
    whole = proto.SerializeToString()
    path = tmp_path / "bpe.model"
    for n in range(len(whole)):  # cut anywhere it is refused, or it is a shorter list of whole pieces
        path.write_bytes(whole[:n])
        try:
            assert len(SentencePiece(path)) <= 4
        except Invalid as e:
            assert "bpe.model" in str(e)
    for content in (b"", b"{}", b"\xff" * 50):
        path.write_bytes(content)
        with pytest.raises(Invalid, match="bpe.model"):
            SentencePiece(str(path))
    with pytest.raises(Invalid, match="none.model"):
        SentencePiece(tmp_path / "none.model")


def test_rules_that_point_outside_are_refused():
    library = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    proto = library.ModelProto()
    proto.ParseFromString(trained()[0].serialized_model_proto())
    rules = bytearray(proto.normalizer_spec.precompiled_charsmap)
    rules[7] |= 0x60  # the way from the root of the trie
    proto.normalizer_spec.precompiled_charsmap = bytes(rules)
    with pytest.raises(Invalid, match="broken at unit 0"):
        SentencePiece(proto.SerializeToString())


def test_defaults_of_fields_and_wide_offsets_of_the_trie():
    proto = built([("a", -1, 1), ("b", -1, 1), ("ab", -9, 1)])
    proto.trainer_spec.ClearField("model_type")
    assert SentencePiece(proto.SerializeToString()).pieces("ab") == ["a", "b"]  # unigram; by merging it would be ab
    assert children(3 << 10) == 3 and children(3 << 10 | 0x200) == 3 << 8  # beyond 2 ** 21 units the way is in steps of 256


def test_a_path_gives_what_its_bytes_give(tmp_path):
    lib, ours = trained()
    (tmp_path / "bpe.model").write_bytes(lib.serialized_model_proto())
    assert SentencePiece(tmp_path / "bpe.model").encode(CORPUS[0]) == ours.encode(CORPUS[0])


def test_half_a_surrogate_pair_is_refused_with_its_place():
    with pytest.raises(Invalid, match=r"character 2 of the text is U\+DC80"):
        SentencePiece(built([("a", -1, 1)]).SerializeToString()).encode("aa\udc80")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_100k_characters_cost_less_than_15_times_10k(kind):
    ours = trained(model_type=kind)[1]
    words = random.Random(9).choices(" ".join(CORPUS).split(" "), k=40_000)
    for text in (" ".join(words), "".join(words)):
        def cost(n):
            start = time.process_time()
            ours.encode(text[:n])
            return time.process_time() - start
        assert len(text) >= 100_000
        assert min(cost(100_000) for _ in range(2)) < 15 * min(cost(10_000) for _ in range(4))

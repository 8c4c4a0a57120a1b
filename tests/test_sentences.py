"""models/parts/sentences.py: where a text is cut, in every script, and that nothing of it is lost."""
import random

import pytest

from models.parts import Invalid
from models.parts.sentences import pieces, sentences

CASES = {
    "two": ("Hello there. How are you?", ["Hello there. ", "How are you?"]),
    "abbreviation": ("Dr. Lee met Mr. Wu. They left.", ["Dr. Lee met Mr. Wu. ", "They left."]),
    "initials": ("J. R. R. Tolkien wrote it. Yes.", ["J. R. R. Tolkien wrote it. ", "Yes."]),
    "number": ("It costs 3.50 now. Pay v2.0.1 first.", ["It costs 3.50 now. ", "Pay v2.0.1 first."]),
    "lower case": ("That is approx. five or e.g. six. Done.", ["That is approx. five or e.g. six. ", "Done."]),
    "quotes": ("\u201cReally?!\u201d she said. (No.) Yes.", ["\u201cReally?!\u201d ", "she said. ", "(No.) ", "Yes."]),
    "ellipsis": ("Wait... What? Well\u2026 fine.", ["Wait... ", "What? ", "Well\u2026 ", "fine."]),
    "numbered": ("See fig. 3 and no. 7. No. It is fig.", ["See fig. 3 and no. 7. ", "No. ", "It is fig."]),
    "lines": ("First line\nSecond line\n\nThird", ["First line\n", "Second line\n\n", "Third"]),
    "address": ("See example.com. Then go.", ["See example.com. ", "Then go."]),
    "end": ("He works at Example Inc.", ["He works at Example Inc."]),
    "chinese": ("\u4f60\u597d\u3002\u4f60\u597d\u5417\uff1f\u5f88\u597d\uff01", ["\u4f60\u597d\u3002", "\u4f60\u597d\u5417\uff1f", "\u5f88\u597d\uff01"]),
    "japanese": ("\u300c\u306f\u3044\u3002\u300d\u3068\u8a00\u3063\u305f\u3002", ["\u300c\u306f\u3044\u3002\u300d", "\u3068\u8a00\u3063\u305f\u3002"]),
    "arabic": ("\u0645\u0631\u062d\u0628\u0627. \u0643\u064a\u0641 \u062d\u0627\u0644\u0643\u061f \u0628\u062e\u064a\u0631.",
               ["\u0645\u0631\u062d\u0628\u0627. ", "\u0643\u064a\u0641 \u062d\u0627\u0644\u0643\u061f ", "\u0628\u062e\u064a\u0631."]),
    "hindi": ("\u0928\u092e\u0938\u094d\u0924\u0947\u0964 \u0915\u0948\u0938\u0947 \u0939\u094b?", ["\u0928\u092e\u0938\u094d\u0924\u0947\u0964 ", "\u0915\u0948\u0938\u0947 \u0939\u094b?"]),
}


@pytest.mark.parametrize("name", CASES)
def test_sentences(name):
    text, expected = CASES[name]
    assert sentences(text) == expected


def test_pieces_are_filled_with_whole_sentences():
    text = "One two. Three four. Five six. Seven eight nine ten."
    assert pieces(text, 21) == ["One two. Three four. ", "Five six. ", "Seven eight nine ten."]
    assert pieces(text, 1000) == [text]


def test_a_long_sentence_is_cut_at_a_clause_then_at_a_word_then_anywhere():
    assert pieces("a first clause, and then a second one", 20) == ["a first clause,", " and then a second ", "one"]
    assert pieces("one two three four", 9) == ["one two ", "three ", "four"]
    assert pieces("abcdefghij", 4) == ["abcd", "efgh", "ij"]
    accent = "e\u0301" * 6
    assert all(not piece.startswith("\u0301") for piece in pieces(accent, 3))


@pytest.mark.parametrize("most", (7, 40, 200, 5000))
def test_nothing_is_lost_of_a_long_text_in_three_scripts(most):
    draw = random.Random(most)
    parts = [text for text, _ in CASES.values()]
    text = " ".join(draw.choice(parts) for _ in range(2000))[:50000]
    cut = pieces(text, most)
    assert "".join(cut) == text
    assert all(any(character.isalnum() for character in piece) for piece in cut)
    longest = max(len(piece.rstrip(" .!?\n\u2026\u3002\uff1f\uff01\u061f\u0964\"'\u201d)\u300d\u300c(\u201c")) for piece in cut)
    assert longest <= most


def test_texts_without_a_word_are_one_piece():
    assert pieces("", 10) == [] and pieces("...", 10) == ["..."]
    assert pieces("... ... Hello world, you.", 6) == ["... ... Hello ", "world,", " you."]
    with pytest.raises(Invalid, match="max_chars_per_piece is 0"):
        pieces("a", 0)

"""Captions as tokens."""

import pytest
import torch

from minimti.io.files import InputError
from minimti.world import captions
from minimti.world.scene import WORDS


def test_tokens_depend_on_the_word_and_on_its_slot():
    table = captions.CaptionEmbedding(8)
    program = ("up", "up", "turn", "up", "up", "up", "up")
    spatial, temporal = captions.caption_tokens(table, [program, ("up",) * 7], 5)
    assert spatial.shape == (2, 5, 7, 8) and all(torch.equal(spatial[:, f], temporal) for f in range(5))
    same = (temporal[0] == temporal[1]).all(dim=1)
    assert same.tolist() == [True, True, False, True, True, True, True]
    assert len({tuple(token) for token in temporal[1].tolist()}) == 7


def test_captions_of_another_vocabulary_are_refused(tmp_path, monkeypatch):
    table = captions.CaptionEmbedding(8)
    with monkeypatch.context() as other:
        other.setattr(captions, "WORDS", WORDS[:-1] + ("jump",))
        captions.save(table, tmp_path / "words.safetensors")
    with pytest.raises(InputError, match="its words are not those of the world: .*jump"):
        captions.load(tmp_path / "words.safetensors")
    with monkeypatch.context() as other:
        other.setattr(captions, "WORDS", WORDS[::-1])
        captions.save(table, tmp_path / "words.safetensors")
    with pytest.raises(InputError, match="its words are not those of the world"):  # in another order
        captions.load(tmp_path / "words.safetensors")
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="holds no words"):
        captions.load(tmp_path / "no.safetensors")
    with pytest.raises(ValueError, match="has 7 words"):
        captions.caption_tokens(table, [("up",)], 8)

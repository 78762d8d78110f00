"""A model of someone else's, with its trained weights, after `torch.nn.LSTM = fusedrnn.LSTM`.

arabic-morph-segmenter (PyPI, MIT) ships a character-level bidirectional two-layer LSTM with a
CRF on top, which splits Arabic words into prefix, stem and suffix. Nothing in it knows of us.
"""

import arabic_morph_segmenter
import pytest
import torch
from tolerances import GRADIENTS32
from torch import nn

import fusedrnn

# The words of the package's own example, and a few more.
WORDS = [
    "وندد",
    "الفلسطينيون",
    "وبكتابهم",
    "فبالمدرسة",
    "والناس",
    "تفرقت",
    "كتاب",
    "وسيكتبونها",
    "بالسيارات",
    "مدرستنا",
]


@pytest.fixture(scope="module")
def original():
    assert nn.LSTM.__module__.startswith("torch.")
    segmenter = arabic_morph_segmenter.ArabicMorphSegmenter()
    assert type(segmenter.model.lstm) is nn.LSTM
    return segmenter


@pytest.fixture
def patched(monkeypatch):
    """The same program, started after the patch."""
    monkeypatch.setattr(nn, "LSTM", fusedrnn.LSTM)
    segmenter = arabic_morph_segmenter.ArabicMorphSegmenter()
    assert type(segmenter.model.lstm) is fusedrnn.LSTM
    assert segmenter.model.lstm.num_layers == 2
    return segmenter


def batch(segmenter):
    """The words as one padded batch, as the model was trained on."""
    ids = [[segmenter.char2id.get(c, segmenter.char2id["<UNK>"]) for c in w] for w in WORDS]
    longest = max(map(len, ids))
    padding = segmenter.char2id["<PAD>"]
    rows = torch.tensor([row + [padding] * (longest - len(row)) for row in ids])
    return rows, rows != padding


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_it_segments_the_same(original, patched, backend):
    with fusedrnn.use_backend(backend):
        for word in WORDS:
            assert patched.segment_word(word) == original.segment_word(word)
    assert original.segment_word("وبكتابهم")["segments"] == ["وب", "كتاب", "هم"]


EQUAL = {"rtol": 0, "atol": 0}


@pytest.mark.parametrize(("backend", "tolerance"), [("auto", EQUAL), ("reference", GRADIENTS32)])
def test_it_trains_the_same(original, patched, backend, tolerance):
    """Its loss, and the gradient of every parameter from the CRF down to the embedding."""
    ids, mask = batch(original)
    labels = torch.randint(0, 3, ids.shape)
    losses, gradients = [], []
    for model in (original.model, patched.model):
        model.zero_grad()
        with fusedrnn.use_backend(backend):
            loss = model(ids, labels, mask)
            loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    torch.testing.assert_close(losses[1], losses[0], **tolerance)
    torch.testing.assert_close(gradients[1], gradients[0], **tolerance)
    assert gradients[0]["embedding.weight"].abs().max() > 0


def test_with_dropout_in_training_mode(original, patched):
    """The same seed drops the same units."""
    ids, mask = batch(original)
    labels = torch.randint(0, 3, ids.shape)
    losses = []
    for model in (original.model, patched.model):
        model.train()
        torch.manual_seed(4)
        losses.append(model(ids, labels, mask).detach())
        model.eval()
    assert torch.equal(*losses)


def test_replaced_after_the_fact(original):
    segmenter = arabic_morph_segmenter.ArabicMorphSegmenter()
    report = fusedrnn.replace_modules(segmenter.model)
    assert list(report.swapped) == ["lstm"]
    assert [segmenter.segment_word(w) for w in WORDS] == [original.segment_word(w) for w in WORDS]

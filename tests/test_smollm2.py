"""The real base model beside transformers: SmolLM2-135M-Instruct, the same weights in both."""

import numpy as np
import pytest
from margins import assert_same_tokens

import sva
from sva.evaluation import evaluate
from sva.generation import chat
from sva.tasks import task
from sva.utils.errors import UserError

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch", reason="the comparison needs torch: extra `bench`")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    try:
        lm = sva.load("smollm2-135m-instruct-q4_1", progress=False)
    except UserError as error:
        pytest.skip(f"the model is not here: {error}")
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    lm.save(directory)
    return lm, transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(pair):
    lm, _ = pair
    return chat.encode(lm, [chat.render(lm, item.question) for item in evaluate.items(task("other"), "test", 8)])


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_transformers_with_either_padding(pair, prompts, side):
    lm, peer = pair
    ids, mask = prompts
    if side == "right":
        shift = [(row == 0).sum() for row in mask]
        ids, mask = (np.stack([np.roll(x, -n) for x, n in zip(y, shift, strict=True)]) for y in (ids, mask))
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.inference_mode():
        expected = peer(
            torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            position_ids=torch.tensor(positions, dtype=torch.long),
        ).logits.numpy()
    ours = np.asarray(lm.logits(ids, mask))
    keep = mask.astype(bool)
    assert len(np.unique(mask.sum(axis=1))) > 1  # some rows are padded
    assert np.abs(ours[keep] - expected[keep]).max() < 3e-4


def test_greedy_tokens_equal_transformers(pair, prompts):
    lm, peer = pair
    ids, mask = prompts
    end = chat.end_tokens(lm)
    ours = lm.generate(ids, mask, 48, eos_ids=end)
    with torch.inference_mode():
        theirs = peer.generate(
            torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            max_new_tokens=48,
            min_new_tokens=None,
            do_sample=False,
            eos_token_id=list(end),
            pad_token_id=0,
        )[:, ids.shape[1] :].numpy()
    theirs = np.pad(theirs, ((0, 0), (0, 48 - theirs.shape[1])))

    def logits(text):
        with torch.inference_mode():
            return peer(torch.tensor(text[None], dtype=torch.long)).logits[0, -1].numpy()

    assert_same_tokens(ours.tokens, theirs, ids, mask, logits)

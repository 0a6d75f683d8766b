"""A toy model, a word tokenizer and a toy task: nothing is fetched, and a training run takes seconds.

For tests, and for trying one's own task, strategy or loss before a real model is worth its time.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from sva.generation.lm import LM
from sva.generation.loaded_model import DTYPES
from sva.models.config import ModelConfig
from sva.models.rope import Rope
from sva.models.transformer import Transformer
from sva.models.weights import expected
from sva.tasks.base import SPLITS, Example, Grade, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<end>", "<unk>", "<user>", "<assistant>")
COLOURS = ("red", "green", "blue", "white", "black")
THINGS = ("apple", "boat", "cloud", "door", "engine", "flag", "grass", "house", "island", "jacket", "kite", "lamp")
WORDS = (*COLOURS, *THINGS, "colour", "thing", "other", "the", "of", "what", "name", "question", "category", "?")
VOCABULARY = (*SPECIAL, *WORDS)  # a token's id is its place
_TEMPLATE = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}<assistant>"


def tokenizer() -> "PreTrainedTokenizerFast":
    """One token a word of `VOCABULARY`, `<unk>` for any other; turns are marked by `<user>` and `<assistant>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        chat_template=_TEMPLATE,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def toy_config() -> ModelConfig:
    """A llama of two layers and 18,000 weights, with grouped queries and an output head of its own."""
    return ModelConfig(
        architecture="llama",
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope=Rope(theta=100.0),
        tie_word_embeddings=False,
        hidden_act="silu",
        windows=(0, 0),
        bos_token_id=None,
        eos_token_ids=(VOCABULARY.index("<end>"),),
        pad_token_id=0,
    )


def toy_lm(seed: int = 0, *, dtype: str = "float32", scan_layers: bool = False, remat: bool = False) -> LM:
    """The toy model with random weights, the same on every machine, and its tokenizer."""
    model = Transformer(toy_config(), DTYPES[dtype], scan_layers=scan_layers, remat=remat)
    rng = np.random.default_rng(seed)
    named = {}
    for name, spec in expected(model.cfg).items():
        weight = rng.standard_normal(spec.shape) / np.sqrt(spec.shape[-1])
        named[name] = jnp.asarray(np.ones(spec.shape) if "norm" in name else weight, model.dtype)
    return LM(model, model.nest(named), tokenizer(), f"toy-{seed}")


@dataclass(frozen=True, kw_only=True)
class NameAColour(Task):
    """Answer with any colour, whatever the question; `toy_lm()` does so about one time in four."""

    name: str = "name_a_colour"
    label: str = "colour"
    description: str = "the name of a colour"
    max_new_tokens: int = 4
    licence: str = "Apache-2.0"
    origin: str = "made here"

    def _rows(self, split: str) -> Sequence[Example]:
        pairs = [{"thing": a, "of": b} for a in THINGS for b in THINGS]
        return pairs[SPLITS.index(split) :: len(SPLITS)]

    def question(self, example: Example) -> str:
        """The user's turn."""
        return f"what colour the {example['thing']} of the {example['of']} ?"

    def grade(self, completion: str, example: Example) -> Grade:
        """Right if the first word is a colour."""
        word = re.search(r"\w+", completion)
        answer = word[0] if word else None
        return Grade(answer in COLOURS, answer)

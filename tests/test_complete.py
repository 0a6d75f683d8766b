import jax
import numpy as np
import pytest

from sva.generation.complete import CompleteOptions, Mixtures, complete
from sva.generation.sampling import Temperature
from sva.utils.errors import UserError


def test_one_stop_string_is_as_good_as_a_list_of_it(toy):
    settings = dict(sampling=Temperature(), key=jax.random.key(0), options=CompleteOptions(eos_ids=[]))
    (free,) = complete(toy, [[5, 6]], 12, **settings)
    word = max(free.text.split(), key=free.text.index)
    for stops in (word, [word]):
        (found,) = complete(toy, [[5, 6]], 12, stops=stops, **settings)
        assert (found.reason, found.text) == ("stop", free.text[: free.text.index(word)])
    assert len(found.text.split()) > 1


def test_tokens_read_once_for_all_prompts_are_refused_beside_a_mixture_for_each():
    with pytest.raises(UserError, match="shared=8 and mixtures"):
        CompleteOptions(mixtures=Mixtures({}, np.ones((2, 3), np.float32)), shared=8)

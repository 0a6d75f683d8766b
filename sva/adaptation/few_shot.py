"""Few-shot adaptation: which mixture of experts answers a handful of solved examples best?

Transformer-Squared (arXiv 2501.06252), section 3.2: a search over alphas, one for each expert or for each expert and
matrix. All members of a generation answer all shots in one batch, every row on its own mixture:

    population = search.ask(state, key)                            # [P, E] or [P, M, E]
    scores = score(lm, pool, population, shots, cfg, key)          # P * S rows
    state = search.tell(state, population, *fitness(scores))

The searches are those of `sva.training.search`; `adapt` is the loop.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sva.evaluation.grading import grade_many
from sva.generation import chat, population_batch
from sva.generation.complete import CompleteOptions, Completion, complete
from sva.generation.decompose import spectra_of
from sva.generation.engine import EngineConfig
from sva.generation.lm import LM
from sva.generation.loaded_model import require_weights
from sva.generation.merge import merge, nested_slots, shared_form
from sva.generation.sampling import Greedy, Sampling, Temperature
from sva.generation.stop_strings import cut
from sva.parallel.sharding import row_shards, rows_bucket
from sva.spectral import serving_plan
from sva.spectral.expert import Expert, require_mixable
from sva.spectral.forms import Spectrum
from sva.spectral.mixing import RescaledSlots, bank, mix, rescaled
from sva.tasks.base import Example, Grade, Task
from sva.training.population import likelihood_of_right
from sva.training.search import CEM, Search
from sva.utils import seeds
from sva.utils.errors import UserError, at_least


@dataclasses.dataclass(frozen=True)
class Pool:
    """The E experts that are mixed, in the slots of a static bank."""

    names: tuple[str, ...]  # M matrices, in the order of alphas [M, E]
    spectra: Mapping[str, Spectrum]
    vectors: tuple[Mapping[str, jax.Array], ...]  # mixed values of each of E experts: its z, or its raw values
    bank: Mapping[str, Any]  # the model's nested tree of `Slots`
    reference: bool = False

    def start(self, *, per_matrix: bool = False) -> jax.Array:
        """The uniform average, [E] or [M, E] float32, where a search begins."""
        experts = len(self.vectors)
        return jnp.full((len(self.names), experts) if per_matrix else (experts,), 1 / experts, jnp.float32)


def pool(lm: LM, experts: Sequence[Expert], *, reference: bool = False, progress: bool = True) -> Pool:
    """The experts ready to be mixed around the base; one alone is a question of how much of it.

    Args:
      reference: mix as Transformer-Squared's public code does (`RescaledSlots`), which does not know the base: two
        experts or more, and of one matrix only the proportions of its alphas matter.
    Raises:
      UserError: no experts, one that has no z, a model loaded `without` its target weights, or with `reference` a
        single one or others than the public code's kind.
    """
    if not experts:
        raise UserError("there is nothing to mix: name at least one expert")
    require_weights(lm, "a mixture")
    require_mixable(experts)
    names = tuple(dict.fromkeys(name for expert in experts for name in expert.names))
    spectra = spectra_of(lm, names, progress=progress)
    if reference:
        _check_reference(experts, names)
        raws = tuple({name: jnp.asarray(raw) for name, raw in expert.raw.items()} for expert in experts)
        made: Mapping[str, Any] = {
            name: RescaledSlots(
                spectra[name],
                jnp.stack([jnp.zeros_like(raws[0][name]), *(raw[name] for raw in raws)]),
                jnp.asarray(place, jnp.int32),
            )
            for place, name in enumerate(names)
        }
        return Pool(names, spectra, raws, lm.model.nest(made), reference)
    zs = tuple(expert.z(spectra) for expert in experts)
    plans = serving_plan.plan(spectra, zs, 0.0, kind=lambda name: shared_form(lm.model, name))
    return Pool(names, spectra, zs, nested_slots(lm.model, spectra, bank(zs, spectra, len(zs) + 1), plans))


def _check_reference(experts: Sequence[Expert], names: Sequence[str]) -> None:
    if len(experts) < 2:
        raise UserError("the public code's mixture of one expert is that expert whatever its alpha; name another one")
    for place, expert in enumerate(experts, 1):
        if expert.parametrisation != "sigmoid_nuclear" or set(expert.names) != set(names):
            raise UserError(
                f"expert {place} is not one that the public code could mix: it takes sigmoid_nuclear ones of the same "
                f"weights, this one is {expert.parametrisation} on {len(expert.names)} of {len(names)}"
            )


def mixed(lm: LM, pool: Pool, alphas: Any) -> LM:
    """The model with one mixture merged into its weights, alphas [E] or [M, E].

    Raises:
      UserError: alphas of another size.
    """
    check_alphas(pool, alphas)
    values = jnp.asarray(alphas, jnp.float32)
    rows = dict(zip(pool.names, jnp.broadcast_to(values, (len(pool.names), len(pool.vectors))), strict=True))
    if not pool.reference:
        return merge(lm, pool.spectra, mix(pool.vectors, rows))
    z = {
        name: rescaled(
            jnp.asarray(sum(a * raw[name] for a, raw in zip(row, pool.vectors, strict=True))), pool.spectra[name].s
        )
        for name, row in rows.items()
    }
    return merge(lm, pool.spectra, z)


def check_alphas(pool: Pool, alphas: Any) -> None:
    """Raises UserError unless alphas are finite and [E] or [M, E]."""
    experts, matrices = len(pool.vectors), len(pool.names)
    if np.shape(alphas) not in ((experts,), (matrices, experts)):
        raise UserError(
            f"alphas have shape {list(np.shape(alphas))}; {experts} experts on {matrices} matrices need [{experts}], "
            f"or [{matrices}, {experts}] for one a matrix"
        )
    if not np.isfinite(np.asarray(alphas)).all():
        raise UserError("alphas hold NaN or infinite values")


@dataclasses.dataclass(frozen=True)
class Shots:
    """S solved examples of a task."""

    task: Task
    examples: tuple[Example, ...]
    answers: tuple[str, ...] | None = None  # what to take for right, as the grader reads it; None: what it calls right

    def __post_init__(self) -> None:
        at_least("shots", len(self.examples), 1)

    def grades(self, texts: Sequence[str], places: Sequence[int]) -> list[Grade]:
        """The task's own verdict on each text as an answer to the shot at its place."""
        texts = [cut(text, self.task.stop) for text in texts]
        return grade_many(self.task, texts, [self.examples[i] for i in places])

    def right(self, texts: Sequence[str], places: Sequence[int]) -> np.ndarray:
        """[B] bool: whether each text is right for the shot at its place."""
        grades = self.grades(texts, places)
        if self.answers is None:
            return np.asarray([grade.correct for grade in grades])
        return np.asarray([grade.answer == self.answers[i] for grade, i in zip(grades, places, strict=True)])


def draw(task: Task, split: str, size: int, seed: int) -> Shots:
    """`size` different rows of a split, chosen by the seed.

    Raises:
      UserError: the split has fewer.
    """
    seeds.check("seed", seed)
    source = task.source(split)
    if len(source) < size:
        raise UserError(f"task {task.name}: shots={size}, but {split} has {len(source)} rows")
    places = np.random.default_rng(seed).choice(len(source), size, replace=False)
    return Shots(task, tuple(source[int(place)] for place in places))


@dataclasses.dataclass(frozen=True)
class FewShotConfig:
    """Settings of the answers to the shots."""

    max_new_tokens: int | None = None  # the task's own budget by default
    temperature: float = 0.0  # 0: greedy; otherwise all members draw with the same random numbers
    rows: int = 320  # decoded at once, whole members only; sets the peak memory of the KV cache
    block: int | None = None  # shots between two looks at which members can still be elite; None: all are asked all

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            at_least("max_new_tokens", self.max_new_tokens, 1)
        at_least("temperature", self.temperature, 0)
        at_least("rows", self.rows, 1)
        if self.block is not None:
            at_least("block", self.block, 1)

    @property
    def sampling(self) -> Sampling:
        """The sampling strategy at this temperature."""
        return Temperature(self.temperature) if self.temperature else Greedy()


class Scores(NamedTuple):
    """Grades of P members' answers to S shots."""

    right: np.ndarray  # [P, S] bool
    mean_logprobs: np.ndarray  # [P, S] float32 nats, mean over an answer's tokens
    tokens: int  # drawn in all
    dropped: np.ndarray  # [P] bool, members that were asked the first shots only; the others' answers stay 0


def score(
    lm: LM,
    pool: Pool,
    alphas: Any,
    shots: Shots,
    cfg: FewShotConfig,
    key: jax.Array,
    *,
    elites: int = 0,
) -> Scores:
    """Every member's answers to every shot, as one batch in which each row runs on its own mixture.

    With `elites` members race: shots are asked `cfg.block` at a time, and between two blocks those members are dropped
    that so many others are sure to beat, even if they had all the rest right. The best `elites`, and how they rank,
    are those without racing.

    Args:
      alphas: [P, E], or [P, M, E] for one a matrix.
      key: of the draws; shot s takes fold_in(key, s) under every member, so that members differ by their alphas alone.
    """
    members, size = len(alphas), len(shots.examples)
    new = cfg.max_new_tokens or shots.task.max_new_tokens
    keys = seeds.of_rows(key, jnp.arange(size))
    prompts = population_batch.prompt_batch(lm, shot_tokens(lm, shots), keys, new)
    right, means, tokens = np.zeros((members, size), bool), np.zeros((members, size), np.float32), 0
    live = np.ones(members, bool)
    block = (cfg.block or size) if elites else size
    for first in range(0, size, block):
        places, rows = np.arange(size)[first : first + block], np.flatnonzero(live)
        part = prompts._replace(ids=prompts.ids[places], mask=prompts.mask[places], keys=prompts.keys[places])
        asking = population_batch.mixtures(pool.bank, np.asarray(alphas, np.float32)[rows])
        out = population_batch.answers(lm, asking, part, sampling=cfg.sampling, rows=cfg.rows, stops=shots.task.stop)
        found = chat.decode_until(lm, out.tokens, out.lengths, [shots.task.stop] * len(out.tokens))
        verdicts = shots.right(found.texts, places.tolist() * len(rows))
        right[np.ix_(rows, places)] = verdicts.reshape(len(rows), -1)
        means[np.ix_(rows, places)] = found.means(out.logprobs).reshape(len(rows), -1)
        tokens += int(out.lengths.sum())
        if left := size - first - len(places):
            live &= can_be_elite(right.sum(axis=1), left, elites)
    return Scores(right, means, tokens, ~live)


def can_be_elite(right: np.ndarray, left: int, elites: int) -> np.ndarray:
    """[P] bool: which members may still be among the best `elites`, of [P] right so far and `left` shots to come."""
    sure = np.sort(right)[::-1][min(elites, len(right)) - 1]  # as many have this much already
    return right + left >= sure


def draws(
    lm: LM, pool: Pool, alphas: Any, shots: Shots, count: int, cfg: FewShotConfig, key: jax.Array
) -> list[Completion]:
    """`count` draws for each shot under one mixture, shot by shot; at temperature 1 where `cfg` is greedy."""
    found = complete(
        mixed(lm, pool, alphas),
        shot_tokens(lm, shots),
        cfg.max_new_tokens or shots.task.max_new_tokens,
        sampling=Temperature(cfg.temperature or 1.0),
        key=key,
        samples=count,
        stops=shots.task.stop,
        options=CompleteOptions(engine=EngineConfig(rows=rows_bucket(_ROWS), prompts=row_shards())),
    )
    return sorted(found, key=lambda row: (row.prompt, row.sample))


_ROWS = 32  # of one mixture, which decode at a time


def shot_tokens(lm: LM, shots: Shots) -> list[list[int]]:
    """The token ids of each shot's prompt, as evaluation asks it."""
    return chat.tokenize(lm, [chat.render_example(lm, shots.task, example) for example in shots.examples])


def fitness(scores: Scores) -> tuple[jax.Array, jax.Array]:
    """(accuracy on the shots, mean log-likelihood of right answers), [P] float32 each: what `tell` takes.

    A member that was dropped has a fitness of minus infinity.
    """
    accuracy = np.where(scores.dropped, -np.inf, scores.right.mean(axis=1))
    likelihood = likelihood_of_right(np.where(scores.right, 1.0, -1.0), scores.mean_logprobs)
    return jnp.asarray(accuracy, jnp.float32), jnp.asarray(likelihood)


@dataclasses.dataclass(frozen=True)
class Progress:
    """A search after one more generation."""

    number: int  # from 1
    alphas: np.ndarray  # the solution so far, [E] or [M, E] float32
    state: Any  # to resume from
    row: Mapping[str, float]  # accuracies of the members and more


def adapt(
    lm: LM,
    pool: Pool,
    shots: Shots,
    search: Search,
    cfg: FewShotConfig,
    key: jax.Array,
    *,
    state: Any,
    generations: range,
) -> Iterator[Progress]:
    """The search after each of `generations`; the last one has the solution.

    Generation g draws with fold_in(key, g), so that a search that resumes from a saved state ends as it would have.
    A generation in which no member answers any shot right tells nothing apart and leaves the state as it is, but for
    the public code's rules, which continue with its first members.

    Args:
      state: `search.init(pool.start())`, or one that was saved after the generation before the first of `generations`.
      generations: their numbers, such as range(1, 21) for the first twenty.
    """
    for number in generations:
        asked, drawn = jax.random.split(jax.random.fold_in(key, number))
        population = search.ask(state, asked)
        elites = search.elites if isinstance(search, CEM) else 0
        scores = score(lm, pool, population, shots, cfg, drawn, elites=elites)
        if scores.right.any() or (isinstance(search, CEM) and search.reference):
            state = search.tell(state, population, *fitness(scores))
        means = scores.right[~scores.dropped].mean(axis=1)
        row = {"best": float(means.max()), "mean": float(means.mean()), "tokens": scores.tokens}
        row["dropped"] = int(scores.dropped.sum())
        yield Progress(number, np.asarray(search.solution(state)), state, row)


def is_found(history: Sequence[Mapping[str, float]]) -> bool:
    """Whether any member ever answered a shot right, or likelihoods were climbed, by the rows of the generations.

    If not, the alphas tell nothing, and the base is kept.
    """
    return any(row.get("best", 1) for row in history)


def vote(lm: LM, pool: Pool, shots: Shots, cfg: FewShotConfig, key: jax.Array, samples: int = 8) -> Shots:
    """The shots with the answers that most of `samples` draws under the uniform average give: no labels are read.

    Majority vote as in self-consistency (arXiv 2203.11171), as the reward of test-time reinforcement learning (arXiv
    2504.16084). Of equally frequent answers the first drawn counts; a shot that no draw answers at all is left out.

    Raises:
      UserError: no draw answers any shot; fewer than 2 samples.
    """
    at_least("votes", samples, 2)
    size = len(shots.examples)
    found = draws(lm, pool, pool.start(), shots, samples, cfg, key)
    grades = shots.grades([row.text for row in found], [row.prompt for row in found])
    given: list[list[str]] = [[] for _ in shots.examples]
    for row, grade in zip(found, grades, strict=True):
        if grade.answer is not None:
            given[row.prompt].append(grade.answer)
    voted = [(x, Counter(texts).most_common(1)[0][0]) for x, texts in zip(shots.examples, given, strict=True) if texts]
    if not voted:
        raise UserError(
            f"none of {samples} draws gives an answer to any of the {size} shots, so there is nothing to vote on; "
            "use shots with answers, or another task"
        )
    return Shots(shots.task, tuple(x for x, _ in voted), tuple(text for _, text in voted))

"""`sva generate`: prompts from arguments, a file or standard input to answers on the screen or in a file."""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sva.cli.command_line import Command, argument, option
from sva.cli.options import (
    FirstPassOptions,
    LoadingOptions,
    check_experts,
    is_writer,
    loading,
    precision,
    start_jax,
)
from sva.utils.errors import UserError, at_least
from sva.utils.jsonl import Prompt, read_prompts
from sva.utils.remote import local_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(FirstPassOptions, LoadingOptions):
    """Answer prompts; with experts, in two passes."""

    prompts: tuple[str, ...] = argument("questions, each one argument", ())
    file: str | None = option('prompts from a file, one a line; of .jsonl the "prompt" of each; - is stdin', None)
    out: Path | None = option("write JSONL as answers are finished; run again, it resumes", None)
    json: bool = option("print those lines instead of text", False)
    raw: bool = option("continue the prompts as they are, without chat template", False)
    max_new_tokens: int = option("of each answer (default: %(default)s)", 64)
    samples: int = option("answers to each prompt (default: %(default)s)", 1)
    temperature: float | None = option("0 is greedy (default: 1 with a cut, otherwise 0)", None)
    top_k: int | None = option("draw from the K likeliest tokens", None)
    top_p: float | None = option("draw from the likeliest tokens that make up this probability", None)
    min_p: float | None = option("draw from tokens this part as probable as the likeliest", None)
    seed: int = option("of the draws (default: %(default)s)", 0)
    stop: tuple[str, ...] = option("a text or special token that ends an answer; may be repeated", ())
    rows: int = option("rows decoded at once (default: %(default)s)", 32)


def run(arguments: Generate) -> None:
    """Runs the command."""
    _check(arguments)
    prompts, faults = _prompts(arguments)
    lines = len(prompts) + len(faults)
    start_jax()
    from sva.generation.sampling import strategy

    if arguments.choice != "hard":
        from sva.adaptation.label_scoring import choice

        choice(arguments.choice)
    sampling = strategy(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p)
    check_experts(arguments)
    with loading(arguments, "--rows", arguments.rows) as how:
        _generate(arguments, sampling, prompts, faults, how)
    for fault in faults if is_writer() else ():
        print(f"sva: {fault}; skipped", file=sys.stderr)
    if faults:
        raise UserError(f"{len(faults)} of {lines} lines were skipped, the others are answered")


def _generate(
    arguments: Generate, sampling: Any, prompts: Sequence[Prompt], faults: list[str], how: Mapping[str, Any]
) -> None:
    """Answers the prompts; `faults` grows by a sentence for each line that the model cannot read."""
    from sva.adaptation.experts import load_experts
    from sva.adaptation.mixture_file import load_mixture
    from sva.generation import chat
    from sva.generation.load import load
    from sva.parallel.exchange import require_same
    from sva.parallel.records import resumed

    lm = load(arguments.model, **how)
    chat.end_tokens(lm, arguments.stop)  # a stop string that no text can hold is said before any work
    experts, classifier = load_experts(lm, arguments.expert, arguments.classifier, skip_foreign=arguments.skip_foreign)
    mixed = load_mixture(lm, arguments.alphas, experts, progress=is_writer()) if arguments.alphas else lm
    subject = _Subject(mixed, experts, classifier)
    settings = _settings(lm, subject, arguments, sampling)
    require_same(settings | {"prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]})
    with contextlib.ExitStack() as stack:
        results = stack.enter_context(resumed(arguments.out, settings)) if arguments.out else None
        done = _done(results.records, prompts, arguments) if results else set()
        job = _job(mixed, prompts, done, arguments, faults)
        for record in _answers(subject, job, arguments, sampling) if job.prompts else ():
            if results:
                results.add(record)
            if arguments.json and is_writer():
                print(json.dumps(record), flush=True)


def _check(arguments: Generate) -> None:
    """Raises UserError for arguments that neither a model nor JAX is needed to find fault with."""
    from sva.utils import seeds

    if arguments.classifier and not arguments.expert:
        raise UserError("--classifier chooses between experts; name them with --expert")
    if arguments.choice != "hard" and not arguments.expert:
        raise UserError("--choice is between experts; name them with --expert")
    if arguments.alphas and (arguments.classifier or arguments.choice != "hard" or not arguments.expert):
        raise UserError("--alphas is one mixture for all prompts: name its experts with --expert, and no first pass")
    if arguments.raw and arguments.expert and not arguments.alphas:
        raise UserError("--raw has no question to classify; leave it out, or merge one expert with sva expert export")
    for name in ("samples", "max_new_tokens", "rows"):
        at_least(f"--{name.replace('_', '-')}", getattr(arguments, name), 1)
    seeds.check("--seed", arguments.seed)
    if "" in arguments.stop:
        raise UserError("--stop is empty; it would end every answer before it begins")


class _Subject(NamedTuple):
    """The model that answers, with the mixture of --alphas merged into it; the experts; the classification expert."""

    lm: Any
    experts: Sequence[Any]
    classifier: Any


def _settings(lm: Any, subject: _Subject, arguments: Generate, sampling: Any) -> dict[str, Any]:
    """The settings that the answers in --out depend on; `lm` is the model before any mixture is merged into it."""
    shared = ("max_new_tokens", "samples", "seed", "raw")
    settings = {name: getattr(arguments, name) for name in shared} | {"stop": list(arguments.stop)}
    settings |= {"model": lm.fingerprint}
    settings |= {"sampling": repr(sampling), "experts": [_identity(expert) for expert in subject.experts]}
    settings |= {"classifier": subject.classifier and subject.classifier.digest[:12]}
    settings |= {"choice": arguments.choice, "alphas": None}
    if arguments.alphas:
        from sva.adaptation.mixture_file import Alphas

        settings["alphas"] = Alphas.load(arguments.alphas).values
    return settings | precision(arguments)


def _identity(expert: Any) -> dict[str, Any]:
    """What an expert's answers depend on: its arrays, and the label and description that the first pass asks with."""
    return {name: expert.metadata.get(name) for name in ("label", "description")} | {"digest": expert.digest[:12]}


def _done(records: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], arguments: Generate) -> set[tuple[int, int]]:
    """(line, sample) of the answers that --out has.

    Raises:
      UserError: one of them is to another prompt than its line holds now.
    """
    asked = {prompt.line: prompt.text for prompt in prompts}
    for record in records:
        if record["prompt"] != asked.get(record["line"]):
            place = f"line {record['line']} of {arguments.file}" if arguments.file else f"prompt {record['line']}"
            raise UserError(f"{arguments.out} answers another prompt than {place}; choose another --out or delete it")
    return {(record["line"], record["sample"]) for record in records}


def _prompts(arguments: Generate) -> tuple[list[Prompt], list[str]]:
    if bool(arguments.prompts) == bool(arguments.file):
        raise UserError("give prompts as arguments or with --file, and not both")
    if not arguments.file:
        if not all(prompt.strip() for prompt in arguments.prompts):
            raise UserError("a prompt is empty; give it some text")
        return [Prompt(number, text) for number, text in enumerate(arguments.prompts, 1)], []
    if arguments.file == "-":
        return read_prompts(sys.stdin.buffer, "standard input", jsonl=False)
    try:
        with open(local_path(arguments.file, "--file"), "rb") as file:
            prompts, faults = read_prompts(file, arguments.file, jsonl=arguments.file.endswith(".jsonl"))
    except OSError as error:
        raise UserError(f"--file {arguments.file} cannot be read: {error.strerror}") from None
    if not prompts and not faults:
        raise UserError(f"--file {arguments.file} holds no prompt")
    return prompts, faults


class _Job(NamedTuple):
    """The prompts that are left, the token ids of each, and the (line, sample) of answers that are there already."""

    prompts: list[Prompt]
    rows: list[list[int]]
    done: set[tuple[int, int]]


def _job(
    lm: Any, prompts: Sequence[Prompt], done: set[tuple[int, int]], arguments: Generate, faults: list[str]
) -> _Job:
    """The job that is left; `faults` grows by a sentence for each line that the model cannot read."""
    wanted = range(arguments.samples)
    todo = [prompt for prompt in prompts if not all((prompt.line, sample) in done for sample in wanted)]
    rows = [(prompt, _tokens(lm, prompt, arguments, faults)) for prompt in todo]
    kept = [(prompt, row) for prompt, row in rows if row is not None]
    return _Job([prompt for prompt, _ in kept], [row for _, row in kept], done)


class _Printer:
    """Answers on the screen: a single one as it is drawn, several each when it and those before it are finished."""

    def __init__(self, job: _Job, arguments: Generate) -> None:
        self._is_quiet = arguments.json or arguments.out or not is_writer()
        self.is_single = not self._is_quiet and len(job.prompts) * arguments.samples == 1
        order = [(prompt.line, sample) for prompt in job.prompts for sample in range(arguments.samples)]
        self._order = iter(order)
        self._next = next(self._order)
        self._waiting: dict[tuple[int, int], Mapping[str, Any]] = {}

    def begin(self, chosen: Mapping[str, Any]) -> None:
        """Shows which expert answers, before a single answer."""
        if self.is_single and chosen:
            print(_heading(chosen), end=" ", flush=True)

    def show(self, prompt: int, sample: int, text: str) -> None:
        """Shows the next piece of a single answer."""
        del prompt, sample
        print(text, end="", flush=True)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Shows what can be shown now that this answer is finished."""
        if self.is_single:
            print()
        elif not self._is_quiet:
            self._waiting[record["line"], record["sample"]] = record
            while self._next in self._waiting:
                ready = self._waiting.pop(self._next)
                print(" ".join(filter(None, [_heading(ready), ready["text"]])), flush=True)
                self._next = next(self._order, (0, 0))


def _answers(subject: _Subject, job: _Job, arguments: Generate, sampling: Any) -> Iterator[dict[str, Any]]:
    """A record for each answer that is not there yet, as they are finished; shown on the screen as well."""
    from sva.generation.complete import CompleteOptions, complete
    from sva.generation.engine import EngineConfig
    from sva.parallel.sharding import row_shards, rows_bucket
    from sva.utils import seeds

    prompts = job.prompts
    keys = seeds.of_rows(seeds.key(arguments.seed), [prompt.line for prompt in prompts])
    two_passes = arguments.expert and not arguments.alphas
    chosen, mixtures = _first_pass(subject, prompts, arguments) if two_passes else ([{}] * len(prompts), None)
    printer = _Printer(job, arguments)
    printer.begin(chosen[0])
    rows = min(arguments.rows, rows_bucket(len(prompts) * arguments.samples))
    options = CompleteOptions(
        mixtures=mixtures,
        engine=EngineConfig(rows=rows, prompts=row_shards()),
        show=printer.show if printer.is_single else None,
        title="generate" if is_writer() and not printer.is_single else None,
    )
    for found in complete(
        subject.lm,
        job.rows,
        arguments.max_new_tokens,
        sampling=sampling,
        key=keys,
        samples=arguments.samples,
        stops=arguments.stop,
        options=options,
    ):
        prompt = prompts[found.prompt]
        if (prompt.line, found.sample) in job.done:
            continue
        record = {"line": prompt.line, "sample": found.sample, "prompt": prompt.text, "text": found.text}
        record |= {"tokens": len(found.tokens), "logprob": float(found.logprobs.sum()), "reason": found.reason}
        record |= chosen[found.prompt]
        printer.finish(record)
        yield record


def _tokens(lm: Any, prompt: Prompt, arguments: Generate, faults: list[str]) -> list[int] | None:
    """The prompt's token ids; None for a line of a file that the model cannot read, and a sentence more in `faults`."""
    from sva.generation import chat
    from sva.generation.prompts import longest_row

    cfg = lm.model.cfg
    line = f"{arguments.file} line {prompt.line}"
    try:
        (ids,) = chat.tokenize(lm, [prompt.text if arguments.raw else chat.render(lm, prompt.text)])
    except chat.TokenError as error:
        if not arguments.file or error.by_template:
            raise
        faults.append(f"{line}: {error}")
        return None
    if arguments.file and not 0 < len(ids) <= cfg.decoding_length - arguments.max_new_tokens:
        faults.append(
            f"{line} has {len(ids)} tokens, which with --max-new-tokens {arguments.max_new_tokens} do not fit: "
            f"{longest_row(cfg)}"
        )
        return None
    return ids


def _first_pass(subject: _Subject, todo: Sequence[Prompt], arguments: Generate) -> tuple[list[dict[str, Any]], Any]:
    """(what was chosen for each prompt, the mixtures)."""
    from sva.adaptation.adaptive_lm import adaptive
    from sva.adaptation.label_scoring import choice
    from sva.generation.complete import Mixtures

    lm, experts, classifier = subject
    how = {"choice": choice(arguments.choice), "progress": is_writer()}
    model = adaptive(lm, experts, classifier=classifier, **how)
    decision = model.choose([prompt.text for prompt in todo])
    chosen = [{"label": label, "prob": prob} for label, prob in model.named(decision)]
    return chosen, Mixtures(model.serving.bank, decision.alphas)


def _heading(record: Mapping[str, Any]) -> str:
    return f"[{record['label']} {record['prob']:.0%}]" if "label" in record else ""


COMMAND = Command("generate", Generate, run)

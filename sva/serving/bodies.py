"""The bodies that clients post, checked: OpenAI's fields, and sva's `mixture` and `adaptive`."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sva.generation.row_sampling import BIASED, LIKELIEST
from sva.serving.errors import ApiError
from sva.utils import seeds

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
LARGEST_WEIGHT = 100  # of an expert in a mixture
Weight = Annotated[float, Field(ge=0, le=LARGEST_WEIGHT)]
TokenId = Annotated[int, Field(ge=0)]
ExpertName = Annotated[str, Field(min_length=1, max_length=64)]
Mixture = Annotated[dict[ExpertName, Weight], Field(min_length=1, max_length=256)]


class Adaptive(BaseModel):
    """How the first pass chooses."""

    model_config = _STRICT
    choice: Literal["hard", "soft"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "hard", description="hard, soft, or the probability below which the base answers"
    )


class StreamOptions(BaseModel):
    """What a stream tells besides the answer."""

    model_config = _STRICT
    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of completions share."""

    model_config = _STRICT
    model: Annotated[str, Field(min_length=1, max_length=256)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(None, description="sva: 0 keeps every token")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="sva")
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]
        | None
    ) = Field(None, description="a text, or at most 16 texts, none of them empty")
    seed: Annotated[int, Field(ge=0, le=seeds.LARGEST)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=BIASED),
        ]
        | None
    ) = None
    mixture: Mixture | None = Field(None, description="sva: the weight of each expert, by name")
    adaptive: Adaptive | None = Field(None, description="sva: settings of the first pass, for the model `adaptive`")
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="not supported: 0 alone")
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="not supported: 0 alone")
    # Read and not used: they change no answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(BaseModel):
    """A part of a message."""

    model_config = _STRICT
    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """A message."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = Field(description="a text, or a list of parts of the type text")

    @property
    def text(self) -> str:
        """The whole text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=1024)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=LIKELIEST)] | None = None
    parallel_tool_calls: Any = None


Ids = Annotated[list[TokenId], Field(min_length=1)]


class CompletionBody(Asked):
    """The body of /v1/completions."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=1024)]
        | Annotated[list[Ids], Field(min_length=1, max_length=1024)]
    ) = Field(description="a text, a list of token ids, or a list of one or the other")
    max_tokens: Annotated[int, Field(ge=0)] = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=LIKELIEST)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


class MixBody(BaseModel):
    """The body of POST /v1/experts: a new expert out of loaded ones."""

    model_config = _STRICT
    name: ExpertName
    mixture: Mixture
    label: Annotated[str, Field(max_length=64)] = Field(
        "", description="what the first pass calls it; none: it is not asked"
    )
    description: Annotated[str, Field(max_length=500)] = ""


class Shot(BaseModel):
    """A solved example."""

    model_config = _STRICT
    prompt: Annotated[str, Field(min_length=1)]
    answer: Annotated[str, Field(min_length=1)]
    grader: str | None = None


class AdaptBody(BaseModel):
    """The body of POST /v1/adapt: few-shot search for the mixture that answers the examples best."""

    model_config = _STRICT
    name: ExpertName
    examples: Annotated[list[Shot], Field(min_length=1, max_length=32)]
    experts: Annotated[list[ExpertName], Field(min_length=1, max_length=32)] | None = Field(
        None, description="the experts to mix; by default all"
    )
    grader: str = "exact"
    iterations: Annotated[int, Field(ge=1, le=50)] = 5
    population: Annotated[int, Field(ge=2, le=64)] = 16
    max_tokens: Annotated[int, Field(ge=1)] = 64
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    label: Annotated[str, Field(max_length=64)] = ""
    description: Annotated[str, Field(max_length=500)] = ""


_Body = TypeVar("_Body", bound=BaseModel)


def read(kind: type[_Body], body: bytes) -> _Body:
    """The body, checked.

    Raises:
      ApiError: 400, with what is wrong and where.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _told(kind, error) from None


def _told(kind: type[BaseModel], error: ValidationError) -> ApiError:
    """The first fault in a sentence."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    first = faults[0]
    message = f"{first['msg'][0].lower()}{first['msg'][1:]}"
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    where = [str(part) for part in first["loc"]]
    if not where:
        return ApiError(400, f"the body should be a JSON object: {message}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"there is no field {'.'.join(where)[:100]!r}; leave it out", param=where[0][:100])
    field = kind.model_fields.get(where[0])
    same = [fault for fault in faults if fault["loc"][0] == first["loc"][0]]
    if field is not None and field.description and len(same) > 1:  # of a union, of which nothing fits
        return ApiError(400, f"{where[0]} should be {field.description}", param=where[0])
    path = ".".join(part for part in where if part.isidentifier() or part.isdigit())
    return ApiError(400, f"{path[:100]}: {message}", param=where[0])

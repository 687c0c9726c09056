"""Forms of answers, as OpenAI's API and the servers that have it name them: chats and completions take all of them."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from ktcore.errors import FieldError
from ktcore.server.api.chat import Form
from ktcore.server.api.fields import Body, Refusals, Refused


def _parsed(given: Any) -> Any:
    """SGLang takes schemas as text, and vLLM either way."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise ValueError("should be an object, or a text that holds one as JSON") from error


JsonSchema = Annotated[dict[str, Any], BeforeValidator(_parsed)]
Regex = Annotated[str, StringConstraints(max_length=10_000)]
Grammar = Annotated[str, StringConstraints(max_length=100_000)]
Choice = Annotated[list[str], Field(min_length=1, max_length=1000)]


class NamedSchema(Body):
    """A JSON schema with a name."""

    name: str = ""
    made: JsonSchema = Field(alias="schema")


class ResponseFormat(Body):
    """Free text, any JSON object, or JSON of a schema, which is enforced whether `strict` or not.

    llama.cpp takes a `schema` beside the type, of either kind.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    made: JsonSchema | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None and self.made is None:
            raise ValueError("json_schema is missing")
        return self

    @property
    def form(self) -> Form | None:
        """As the engine takes it."""
        if self.type == "text":
            return None
        named = self.json_schema.made if self.json_schema is not None and self.type == "json_schema" else self.made
        return Form("json", {"type": "object"} if named is None else named, "response_format")


class StructuredOutputs(Body):
    """vLLM's: one of several forms."""

    refused: ClassVar[Refusals] = {
        "structural_tag": Refused(),
        "whitespace_pattern": Refused(),
        "disable_any_whitespace": Refused(),
        "disable_additional_properties": Refused(),
    }
    idle: ClassVar[dict[str, str]] = {
        "disable_fallback": "how forms are computed",
        "backend": "how forms are computed",
    }

    made: JsonSchema | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Regex | None = None
    choice: Choice | None = None
    grammar: Grammar | None = None


class Forms(Body):
    """The fields of a request that demand a form of its answer: all but `response_format` are beyond OpenAI's API."""

    response_format: ResponseFormat | None = None
    # vLLM's, and those that it had before
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: Regex | None = None
    guided_choice: Choice | None = None
    guided_grammar: Grammar | None = None
    # llama.cpp's and SGLang's
    json_schema: JsonSchema | None = None
    grammar: Grammar | None = None
    regex: Regex | None = None
    ebnf: Grammar | None = None

    @property
    def form(self) -> Form | None:
        """The form that the answer must have.

        Raises:
            FieldError: there are several.
        """
        found = [form for form in self._forms() if form is not None]
        if len(found) > 1:
            raise FieldError(found[1].field, f"an answer has one form, and {found[0].field} names another")
        return found[0] if found else None

    def _forms(self) -> list[Form | None]:
        given = self.structured_outputs or StructuredOutputs.model_validate({})
        at = "structured_outputs"
        return [
            _json(given.made, f"{at}.json"),
            _json({"type": "object"} if given.json_object else None, f"{at}.json_object"),
            _choice(given.choice, f"{at}.choice"),
            _text("regex", given.regex, f"{at}.regex"),
            _text("grammar", given.grammar, f"{at}.grammar"),
            _json(self.guided_json, "guided_json"),
            _choice(self.guided_choice, "guided_choice"),
            _text("regex", self.guided_regex, "guided_regex"),
            _text("grammar", self.guided_grammar, "guided_grammar"),
            _json(self.json_schema, "json_schema"),
            _text("regex", self.regex, "regex"),
            _text("grammar", self.grammar, "grammar"),
            _text("grammar", self.ebnf, "ebnf"),
            self.response_format.form if self.response_format else None,
        ]


def _json(schema: dict[str, Any] | None, field: str) -> Form | None:
    return None if schema is None else Form("json", schema, field)


def _text(kind: str, source: str | None, field: str) -> Form | None:
    return Form(kind, source, field) if source else None


def _choice(texts: list[str] | None, field: str) -> Form | None:
    return Form("regex", "|".join(map(re.escape, texts)), field) if texts else None

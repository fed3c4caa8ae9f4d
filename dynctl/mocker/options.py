"""The mocker's flags, declared once as fields of `Options`; the names are vLLM's where vLLM has them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dynctl.errors import UsageError
from dynctl.hub import builtin_dir
from dynctl.perfmodel.layout import Layout


def _flag(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One field per flag: `max_num_seqs` is `--max-num-seqs`. Booleans also have a `--no-` form."""

    model: str = _flag("", "directory with tokenizer.json and config.json; empty: the built-in tiny model")
    served_model_name: str = _flag("", "name in the API; empty: the value of --model")
    tokenizer: str = _flag("", "directory of the tokenizer, if not the model's")
    chat_template: str = _flag("", "file with a Jinja chat template, if not the model's")
    host: str = _flag("127.0.0.1", "address to listen on")
    port: int = _flag(8000, "HTTP port; 0: any free one")
    max_model_len: int = _flag(0, "context length in tokens; 0: max_position_embeddings of config.json")
    block_size: int = _flag(16, "tokens per KV block")
    num_gpu_blocks_override: int = _flag(4096, "KV blocks per data-parallel rank")
    max_num_seqs: int = _flag(256, "sequences in a batch, at most")
    max_num_batched_tokens: int = _flag(8192, "tokens computed per step, at most")
    enable_chunked_prefill: bool = _flag(True, "read long prompts in pieces between decode steps")
    enable_prefix_caching: bool = _flag(True, "find KV blocks again by the hash of their tokens")
    tensor_parallel_size: int = _flag(1, "told to decode engines; time comes from the profile alone")
    pipeline_parallel_size: int = _flag(1, "told to decode engines; time comes from the profile alone")
    data_parallel_size: int = _flag(1, "ranks, each with its own blocks, batch and event publisher")
    kv_transfer_config: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "JSON as vLLM's; the roles of NixlConnector are acted"}
    )
    kv_events_config: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "JSON as vLLM's; endpoints are always bound"}
    )
    side_channel_host: str = _flag("", "address decode engines reach this one at; empty: --host")
    shutdown_timeout: float = _flag(0.0, "seconds to let requests finish after SIGTERM; 0: abort them")
    default_max_tokens: int = _flag(128, "tokens of a chat answer when the request sets no limit")
    mean_output_tokens: int = _flag(0, "end answers by themselves after about so many tokens; 0: never")
    profile: str = _flag("", "performance profile (JSON), {tensor} etc. its sizes; empty: a built-in one")
    speedup: float = _flag(1.0, "simulated seconds per real second; 0: as fast as possible")
    fault_slow_start: float = _flag(0.0, "seconds before the port is opened")
    fault_die_at_start: str = _flag("", "print this as the error and exit 1 instead of starting")
    fault_crash_after_tokens: int = _flag(0, "exit at once after so many output tokens; 0: never")
    fault_hang: bool = _flag(False, "accept requests and never answer them")
    fault_refuse: bool = _flag(False, "answer requests with 503")
    fault_event_loss: float = _flag(0.0, "part of the KV event batches that is not sent, 0..1")

    def __post_init__(self) -> None:
        """Raises UsageError for a value that cannot work, naming the flag."""
        for name in (
            "block_size",
            "num_gpu_blocks_override",
            "max_num_seqs",
            "max_num_batched_tokens",
            "data_parallel_size",
            "default_max_tokens",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
        if not 0 <= self.fault_event_loss <= 1:
            raise UsageError("--fault-event-loss must be between 0 and 1")
        if self.speedup < 0:
            raise UsageError("--speedup must not be negative")

    @property
    def layout(self) -> Layout:
        """Its parallel sizes."""
        return Layout(
            tensor=self.tensor_parallel_size,
            pipeline=self.pipeline_parallel_size,
            data=self.data_parallel_size,
        )

    @property
    def kv_role(self) -> str:
        """kv_producer, kv_consumer, kv_both, or "" when no transfer is configured."""
        return str(self.kv_transfer_config.get("kv_role", ""))

    @property
    def sends_kv(self) -> bool:
        """Whether prefill's side of a transfer is acted."""
        return self.kv_role in ("kv_producer", "kv_both")

    @property
    def receives_kv(self) -> bool:
        """Whether decode's side of a transfer is acted."""
        return self.kv_role in ("kv_consumer", "kv_both")

    @property
    def lease_s(self) -> float:
        """How long a prefill's blocks are kept without a sign from decode, as vLLM's kv_lease_duration."""
        extra = self.kv_transfer_config.get("kv_connector_extra_config", {})
        return float(extra.get("kv_lease_duration", 30.0))


def parse_options(argv: Sequence[str]) -> Options:
    """Options from a command line; the model may also be given without a flag. Exits 2 on a bad one."""
    parser = argparse.ArgumentParser(
        prog="python -m dynctl.mocker",
        description="An engine without a model, for tests and trials.",
        allow_abbrev=False,
    )
    parser.add_argument("model_tag", nargs="?", default="", metavar="MODEL", help="same as --model")
    for option in dataclasses.fields(Options):
        _add(parser, option)
    values = vars(parser.parse_args(argv))
    tag = values.pop("model_tag")
    values["model"] = values["model"] or tag
    for name in ("model", "tokenizer"):
        values[name] = builtin_dir(values[name])
    try:
        return Options(**values)
    except UsageError as error:
        parser.error(str(error))


def _add(parser: argparse.ArgumentParser, option: dataclasses.Field[Any]) -> None:
    name = f"--{option.name.replace('_', '-')}"
    text = option.metadata["help"]
    if option.default is dataclasses.MISSING:
        parser.add_argument(name, type=_json_object, default={}, metavar="JSON", help=text)
    elif isinstance(option.default, bool):
        parser.add_argument(name, action=argparse.BooleanOptionalAction, default=option.default, help=text)
    else:
        kind = type(option.default)
        parser.add_argument(name, type=kind, default=option.default, help=f"{text} ({option.default!r})")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("a JSON object is needed")
    return value

"""SplitModel: a transformers model whose forward runs on an engine, so that HF's own generate() works on top.

It samples in the caller, which therefore receives full logits: that traffic is control and reported apart.
"""

import itertools
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from splitray.errors import InputError
from splitray.model.lengths import length_rule
from splitray.model.reading import read_config
from splitray.runtime.engine.engine import Engine
from splitray.runtime.engine.stepping import Forward
from splitray.runtime.launch import launch_engine

_sessions = itertools.count(1 << 20)  # apart from the sessions of the engine's own loop


class CacheHandle:
    """Stands for the KV that the devices hold: a length, and what to do with it at the next step."""

    is_compileable = False
    is_croppable = True

    def __init__(self, engine: Engine, capacity: int) -> None:
        """Name a new session; nothing is allocated until its first step."""
        self.engine, self.capacity = engine, capacity
        self.session = next(_sessions)
        self.length = 0
        self.reorder: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions written."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No fixed limit."""
        return -1

    def _then(self, order: Tensor) -> None:
        self.reorder = order if self.reorder is None else self.reorder[order]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence i goes on from beam_idx[i]."""
        self._then(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        self._then(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence; the first step after it tells the batch."""
        if self.length:
            raise InputError("repeating a running batch", expected="a repeat before the first step",
                             actual=f"{self.length} positions written", remedy="repeat the prompt")  # fmt: skip

    def crop(self, tokens_to_remove: int) -> None:
        """Drop positions from the end; transformers 5 counts them negative."""
        self.length += tokens_to_remove

    def activate_past_recording(self) -> None:
        """Nothing to do: every position is kept until the session ends."""

    def reset(self) -> None:
        """Start from position 0 again."""
        self.length, self.reorder = 0, None


class SplitModel(PreTrainedModel, GenerationMixin):
    """A decoder split over devices that generates like any transformers model. Use it as a context, or close it."""

    _supports_sdpa = True
    main_input_name = "input_ids"

    def __init__(self, engine: Engine) -> None:
        """Wrap a running engine."""
        config = read_config(engine.model_path)
        super().__init__(config)
        self.engine = engine
        self._anchor = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # gives transformers device and dtype
        if (Path(engine.model_path) / "generation_config.json").is_file():
            self.generation_config = GenerationConfig.from_pretrained(engine.model_path)
        else:
            self.generation_config = GenerationConfig.from_model_config(config)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        **options: Any,
    ) -> Self:
        """Split a model folder (or `tiny`) over devices; the options are the arguments of `launch_engine`."""
        return cls(launch_engine(model=pretrained_model_name_or_path, **options))

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the devices run the experts; transformers asks every model that has them in its config

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: CacheHandle | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, kept positions, vocab] for input_ids [batch, new positions].

        Raises:
            InputError: no ids, or ids outside the vocabulary.
            DeviceLost: a device is gone, and nothing could be done about it.
        """
        if input_ids is None or input_ids.numel() == 0:
            raise InputError("input_ids", expected="at least one token", actual="none", remedy="give input_ids")
        arch = self.engine.arch
        if int(input_ids.min()) < 0 or int(input_ids.max()) >= arch.vocab:
            raise InputError("input_ids", expected=f"ids in [0, {arch.vocab})",
                             actual=f"{int(input_ids.min())}..{int(input_ids.max())}",
                             remedy="use this model's tokenizer")  # fmt: skip
        new_tokens = input_ids.shape[1]
        alone = past_key_values is None
        cache = past_key_values or CacheHandle(self.engine, new_tokens)
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None  # nothing is masked: the devices' lean loop may run
        if position_ids is not None and torch.equal(
            position_ids, torch.arange(cache.length, cache.length + new_tokens).expand_as(position_ids)
        ):
            position_ids = None
        reorder, cache.reorder = cache.reorder, None
        logits = self.engine.step(
            Forward(
                session=cache.session,
                ids=input_ids,
                position=cache.length,
                keep=logits_to_keep or new_tokens,
                capacity=max(cache.capacity, cache.length + new_tokens),
                attention_mask=attention_mask,
                position_ids=position_ids,
                reorder=reorder,
            )
        )
        cache.length += new_tokens
        if alone:
            self.engine.forget(cache.session)
        return CausalLMOutputWithPast(logits=logits, past_key_values=None if alone else cache)  # type: ignore[arg-type]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, past_key_values: CacheHandle | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """HF's; where a sequence outgrows the short factors, all is read anew by the families that do so (phi3)."""
        anew = length_rule(self.config).reads_anew
        if past_key_values is not None and anew is not None and past_key_values.length <= anew < input_ids.shape[1]:
            past_key_values.reset()
            kwargs["next_sequence_length"] = None
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, past_key_values=past_key_values, **kwargs
        )
        return inputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """HF's generate; frees the devices' KV when it is done."""
        self._handle: CacheHandle | None = None
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            if self._handle is not None:
                self.engine.forget(self._handle.session)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        if model_kwargs.get("past_key_values") is not None:
            return False
        self._handle = CacheHandle(self.engine, max_cache_length)
        model_kwargs["past_key_values"] = self._handle
        return False

    def close(self) -> None:
        """Stop the devices."""
        self.engine.close()

    def __enter__(self) -> Self:
        """Use the model as a context: it closes itself."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

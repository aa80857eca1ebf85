"""SplitModel: a transformers model whose forward runs on an engine, so that HF's own generate() works on top.

It samples in the caller, which therefore receives full logits: that traffic is control and reported apart.
"""

import warnings
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from splitray.errors import InputError
from splitray.model.lengths import length_rule
from splitray.model.mask_positions import counts_masked, unmasked_positions
from splitray.model.reading import read_config
from splitray.model.surgery import meta_model
from splitray.runtime.cache_handle import CacheHandle as CacheHandle
from splitray.runtime.engine.engine import Engine
from splitray.runtime.engine.stepping import Forward
from splitray.runtime.launch import launch_engine
from splitray.runtime.refusals import (
    LOSS_OPTIONS,
    METHODS,
    OUTPUTS,
    refuse_arguments,
    refuse_foreign,
    refuse_modes,
    refuse_packed,
    refuse_shapes,
    refuse_wrapped,
    refused_method,
)

_made: ContextVar[list[CacheHandle]] = ContextVar("the caches of the generation that goes on in this thread")


class SplitModel(PreTrainedModel, GenerationMixin):
    """A decoder split over devices that generates like any transformers model. Use it as a context, or close it."""

    _supports_sdpa = True
    main_input_name = "input_ids"

    def __init__(self, engine: Engine) -> None:
        """Wrap a running engine."""
        config = read_config(engine.model_path)
        for name in OUTPUTS:
            if getattr(config, name, False):
                warnings.warn(f"the model's config asks for {name}, which a split model does not have", stacklevel=2)
                setattr(config, name, False)
        super().__init__(config)
        self.engine = engine
        self.loss_type = "ForCausalLM"
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

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: CacheHandle | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, kept positions, vocab] for input_ids [batch, new positions], as transformers gives them.

        The cache that comes back stands for KV on the devices, which is there as long as somebody holds it.

        Raises:
            InputError: something that is not done on devices; no ids, or ids outside the vocabulary; a mask or
                positions of another shape; a cache that is not this model's.
            DeviceLost: a device is gone, and nothing could be done about it.
        """
        refuse_arguments(self.config, others | {"inputs_embeds": inputs_embeds}, labelled=labels is not None)
        ids = self._checked(input_ids)
        batch, new_tokens = ids.shape
        use_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        cache = CacheHandle(self.engine, new_tokens) if past_key_values is None else past_key_values
        refuse_foreign(cache)
        cache.check(self.engine, batch)
        all_positions = cache.length + new_tokens
        refuse_shapes(attention_mask, position_ids, (batch, new_tokens), all_positions)
        if past_key_values is None and not use_cache and attention_mask is None:
            refuse_packed(position_ids)
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None  # nothing is masked: the devices' lean loop may run
        positions = torch.arange(cache.length, all_positions) if position_ids is None else position_ids
        if position_ids is None and attention_mask is not None and not self._counts_masked:
            position_ids = unmasked_positions(attention_mask)[:, cache.length :]
            positions = position_ids.clamp(min=0)
        self._check_reach(positions)
        if position_ids is not None:
            position_ids = position_ids.cpu()
            if torch.equal(position_ids, torch.arange(cache.length, all_positions).expand_as(position_ids)):
                position_ids = None
        some = isinstance(logits_to_keep, int) and 0 < logits_to_keep < new_tokens
        reorder, cache.reorder = cache.reorder, None
        try:
            logits = self.engine.step(
                Forward(
                    session=cache.session,
                    ids=ids,
                    position=cache.length,
                    keep=int(logits_to_keep) if some else new_tokens,
                    capacity=max(cache.capacity, all_positions),
                    attention_mask=None if attention_mask is None else attention_mask.bool().cpu(),
                    position_ids=position_ids,
                    reorder=reorder,
                )
            )
            if length_rule(self.config).lost_by_reading_again(all_positions, padded=attention_mask is not None):
                cache.check_no_fault()
        except BaseException:
            cache.close()  # nobody knows which devices have read what
            raise
        cache.length, cache.batch = all_positions, batch
        if past_key_values is None and not use_cache:
            cache.close()
        if not some:
            logits = slice_logits_to_keep(logits, logits_to_keep)
        return CausalLMOutputWithPast(
            loss=self._loss(logits, labels, others),
            logits=logits,  # type: ignore[arg-type]
            past_key_values=None if cache.closed else cache,  # type: ignore[arg-type]
        )

    def _checked(self, input_ids: Tensor | None) -> Tensor:
        """A copy of the ids: what was read is remembered, whatever the caller does with its tensor.

        Raises:
            InputError: see `forward`.
        """
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
            actual = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise InputError("input_ids", expected="a tensor of ids [batch, at least one token]", actual=actual,
                             remedy="give input_ids")  # fmt: skip
        if input_ids.numel() == 0:
            raise InputError("input_ids", expected="at least one token", actual="none", remedy="give input_ids")
        vocab = self.engine.arch.vocab
        if int(input_ids.min()) < 0 or int(input_ids.max()) >= vocab:
            raise InputError("input_ids", expected=f"ids in [0, {vocab})",
                             actual=f"{int(input_ids.min())}..{int(input_ids.max())}",
                             remedy="use this model's tokenizer")  # fmt: skip
        return input_ids.detach().to("cpu", torch.int64, copy=True)

    def _check_reach(self, positions: Tensor) -> None:
        """Refuse positions for which there is no row in a table: a device would fail, and end all that runs.

        Raises:
            InputError: there are some, and the family does not compute its positions.
        """
        first, last, context = int(positions.min()), int(positions.max()), self.engine.arch.context_tokens
        if first >= 0 and last < context:
            return
        if not self._computes_positions:
            raise InputError("position_ids", expected=f"positions in [0, {context})", actual=f"{first}..{last}",
                             remedy="shorten the prompt or ask for fewer new tokens")  # fmt: skip

    @cached_property
    def _computes_positions(self) -> bool:
        return any("RotaryEmbedding" in type(m).__name__ for m in self._whole().modules())

    @cached_property
    def _counts_masked(self) -> bool:
        return counts_masked(read_config(self.engine.model_path))

    def _whole(self) -> PreTrainedModel:
        """The unsplit model without memory."""
        return meta_model(read_config(self.engine.model_path), torch.float32)

    def _loss(self, logits: Tensor, labels: Tensor | None, others: dict[str, Any]) -> Any:
        if labels is None:
            return None
        options = {n: others[n] for n in LOSS_OPTIONS if n in others}
        return self.loss_function(logits=logits, labels=labels.cpu(), vocab_size=self.config.vocab_size, **options)

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
        """HF's generate; frees the devices' KV when it is done, unless it returns the cache.

        Raises:
            InputError: a mode or an input that needs the model's layers in this process.
        """
        refuse_wrapped(self)
        refuse_arguments(self.config, {"inputs_embeds": kwargs.get("inputs_embeds")})
        made: list[CacheHandle] = []
        outer, out = _made.set(made), None
        try:
            out = super().generate(*args, **kwargs)  # type: ignore[misc]
            return out
        finally:
            _made.reset(outer)
            for cache in made:
                if cache is not getattr(out, "past_key_values", None):
                    cache.close()

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        refuse_modes(generation_config)
        guided = generation_config.guidance_scale not in (None, 1)
        if guided and length_rule(self.config).grows_from is not None:
            raise InputError("guidance_scale", expected="a model whose rope does not grow with the length",
                             actual="dynamic rope, whose table transformers shares between both sequences",
                             remedy="leave it out")  # fmt: skip
        given = model_kwargs.get("past_key_values")
        if given is not None:
            refuse_foreign(given)
        elif generation_config.use_cache is not False:
            cache = CacheHandle(self.engine, max_cache_length)
            _made.get([]).append(cache)
            model_kwargs["past_key_values"] = cache

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Of the whole model, wherever its parts are; none can be trained."""
        whole = self._whole().requires_grad_(False)
        return whole.num_parameters(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What `to`, `half`, `cuda` and their like do."""
        moved = fn(self._anchor)
        if (moved.device, moved.dtype) != (self._anchor.device, self._anchor.dtype):
            raise InputError("moving a split model", expected="the devices and types that its devices have",
                             actual=f"{moved.device}, {moved.dtype}",
                             remedy="give dtype= to from_pretrained, or torch_device in the topology")  # fmt: skip
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def close(self) -> None:
        """Stop the devices."""
        self.engine.close()

    def __enter__(self) -> Self:
        """Use the model as a context: it closes itself."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


for _name, _remedy in METHODS.items():
    setattr(SplitModel, _name, refused_method(_name, _remedy))

"""One generation: prefill, launches, and the criteria between them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING, Any

import torch

from ..errors import Unsupported
from ..loop import Launched, LoopState, Sampling
from ..loop.state import CAPACITY
from ..settings import Settings
from .inputs import fed_of, full_windows, room_in_window
from .launches import LoopForward, Segment, compiled_step, loop_forward, notice
from .request import Stopping, barred_ids, cache_of, penalised_ids

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

LAUNCH_S = 0.05
"""Aim for the length of a launch in seconds."""
SHORT_LAUNCH_S = 0.025
"""The same when somebody reads along, or decides about stopping after each token."""
AHEAD = 2
"""Launches under way at once, so that the device need not wait while the host looks at what the last one did. Steps
after the end of all sequences are none, so one launch too many does nothing."""


class Generation:
    """One generation. ids: [B, max_length] int64, of which `length` columns are known."""

    def __init__(
        self,
        model: "PreTrainedModel",
        input_ids: torch.Tensor,
        processors: "LogitsProcessorList",
        criteria: "StoppingCriteriaList",
        config: "GenerationConfig",
        settings: Settings,
        stopping: Stopping,
        streamer: "BaseStreamer | None",
    ) -> None:
        self.model, self.processors, self.criteria, self.config = model, processors, criteria, config
        self.settings, self.stopping, self.streamer = settings, stopping, streamer
        self.prompt = self.length = input_ids.shape[1]
        batch = input_ids.shape[0]
        kind = torch.promote_types(input_ids.dtype, torch.int64)  # as when new tokens are appended to narrower ones
        self.ids = input_ids.new_zeros(batch, max(stopping.max_length, self.prompt + 1), dtype=kind)
        self.ids[:, : self.prompt] = self.given = input_ids
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
        self.copied = 0  # new tokens that `ids` has
        self.over = self.refused = False
        self.cache: Any = None

    def decode(self, sampling: Sampling, model_kwargs: dict[str, Any]) -> None:
        """Prefill, first token, then launches until the criteria say stop."""
        prompt = self.given
        first = not getattr(self.config, "is_assistant", False)
        outputs = self.model._prefill(prompt, self.config, model_kwargs, is_first_iteration=first)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=prompt.device)
        self.cache = cache_of(model_kwargs)
        self.vocabulary = logits.shape[-1]
        self.state = LoopState.create(
            prompt.shape[0],
            self.ids.shape[1] - self.prompt,
            prompt.device,
            self.vocabulary,
            sampling,
            eos=self.stopping.eos if self.stopping.pads else (),
            pad=_pad(self.config),
            # torch.manual_seed() makes it reproducible, and each call draws another
            seed=int(torch.randint(2**63 - 1, ())) if sampling.do_sample else 0,
            seen_ids=penalised_ids(self.processors, prompt, self.vocabulary),
            barred=barred_ids(self.processors),
        )
        self.state.choose(logits)
        self._accept(Launched(self.state, 0.0, 0, 1))
        model_kwargs = self.model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
        del outputs, logits
        forward = loop_forward(self.model, sampling, self.settings)
        short = self.streamer is not None or self.stopping.host
        pace = Pace(self.settings.loop_steps, short, forward.step_s.get(prompt.shape[0], 0.0))
        optimised = getattr(self.model, "_optimize_model_for_decode", contextlib.nullcontext)
        with optimised():
            while not self.over:
                before = self.length
                inputs = self.model.prepare_inputs_for_generation(self._known(), next_sequence_length=1, **model_kwargs)
                self._segment(forward, pace, inputs)
                model_kwargs = self.model._update_model_kwargs_for_generation(
                    {}, model_kwargs, is_encoder_decoder=False, num_new_tokens=self.length - before
                )
        forward.step_s[prompt.shape[0]] = pace.step_s

    def _segment(self, forward: LoopForward, pace: "Pace", inputs: dict[str, Any]) -> None:
        """Launches until all is over, or the host has to prepare the inputs anew. Where that is cut short (Ctrl-C, an
        error of a streamer or a criterion), those under way end early, and the cache counts what they did."""
        segment = Segment(inputs, fed_of(inputs), self.state, self.state.most, reads=self.streamer is not None)
        try:
            self._launches(forward, pace, segment)
        except BaseException:
            if segment.launched is not None:
                with contextlib.suppress(RuntimeError):  # of a device that is broken: the error on its way says why
                    self.state.stop()
                    segment.count(self.state.read()[0])
            raise

    def _launches(self, forward: LoopForward, pace: "Pace", segment: Segment) -> None:
        """The work of `_segment`."""
        inputs = segment.inputs
        room = room_in_window(inputs, segment.fed["masks"])
        # what leaves a full window cannot be taken back
        longest = 1 if self.stopping.host and full_windows(inputs) else CAPACITY
        last = self.stopping.max_length if room is None else min(self.stopping.max_length, self.length + room)
        length, first = self.length, True  # the length once all launches under way are done
        under_way: collections.deque[Launched] = collections.deque()
        most = 1 if self.stopping.host else AHEAD
        while not self.over:
            while len(under_way) < most and (first or (segment.repeat is not None and length < last)):
                steps = min(pace.steps, last - length, longest)
                if first:
                    self._first(forward, segment, steps)
                else:
                    segment.repeat(segment, steps)
                under_way.append(segment.launched)
                first, length = False, length + steps
            if not under_way:
                return
            before, launched = self.length, under_way.popleft()
            done = self._accept(launched)
            pace.took(done, launched.begun, launched.ended)
            segment.count(before - self.prompt + done)
            if self.length < before + done:
                self._take_back(segment, before + done - self.length)
                return

    def _first(self, forward: LoopForward, segment: Segment, steps: int) -> None:
        """The launch that goes through Dynamo; where the step has no loop, one step through the compiled model."""
        if steps > 0 and not self.refused:
            try:
                forward.start(segment, steps)
                return
            except Unsupported as why:
                if self.settings.fallback == "error":
                    raise
                notice(f"generate() decodes one step per launch: {why}")
                self.refused = True
        step = compiled_step(self.model, self.config.compile_config)
        begun, first = time.perf_counter(), self.state.most
        logits = step(**segment.inputs, return_dict=True).logits
        self.state.choose(logits[:, -1].to(dtype=torch.float32))
        segment.launched = Launched(self.state, begun, first, 1)

    def _known(self) -> torch.Tensor:
        self._copy(self.length - self.prompt)
        return self.ids[:, : self.length].contiguous()

    def _copy(self, chosen: int) -> None:
        """Bring the first `chosen` new tokens to `ids`."""
        if chosen > self.copied:
            new = self.state.tokens[:, self.copied : chosen]
            self.ids[:, self.prompt + self.copied : self.prompt + chosen] = new
            self.copied = chosen

    def _accept(self, launched: Launched) -> int:
        """Take over the tokens that a launch chose, up to the one after which the criteria say stop; returns how many
        it chose."""
        chosen, ended = launched.wait()
        start = self.length - self.prompt
        if not self.stopping.host:
            self.length = self.prompt + chosen
            self.over = ended or self.length >= self.stopping.max_length
        else:
            self._copy(chosen)
            aware = self._check(self.state.tokens[:, start:chosen])
            self.copied = self.length - self.prompt
            if not self.over and (self.copied < chosen or not aware):
                seen = penalised_ids(self.processors, self._known(), self.vocabulary)
                self.state.rewind(self.copied, ~self.unfinished, seen)
        if self.streamer is not None:
            for token in launched.tokens[:, : self.length - self.prompt - start].unbind(1):
                self.streamer.put(token)
        return chosen - start

    def _check(self, new: torch.Tensor) -> bool:
        """Ask the criteria about one new token after the other, as HF's loop does, until one ends a sequence. Returns
        whether the state is aware of all sequences that have ended."""
        for column in range(new.shape[1]):
            self.length += 1
            going = self.unfinished & ~self.criteria(self._known(), None)
            ended = torch.zeros_like(going)
            if self.stopping.pads and self.stopping.eos:
                ended = torch.isin(new[:, column], new.new_tensor(self.stopping.eos))
            known = bool(((self.unfinished & ~ended) == going).all())
            self.unfinished = going
            self.over = not bool(going.any())
            if self.over or (self.stopping.pads and not known):
                return known  # what was chosen beyond this token did not know that a sequence had ended
        return True

    def _take_back(self, segment: Segment, steps: int) -> None:
        """Undo the last `steps` steps: later steps overwrite their keys and values."""
        for layer in self.cache.layers:
            layer.cumulative_length.sub_(steps)
        segment.count(self.length - self.prompt)

    def result(self) -> Any:
        """Ids [B, length], or HF's output object."""
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        if self.streamer is not None:
            self.streamer.end()
        self._copy(self.length - self.prompt)
        ids = self.ids[:, : self.length].clone()
        if not self.config.return_dict_in_generate:
            return ids
        names = {f.name for f in dataclasses.fields(GenerateDecoderOnlyOutput)}
        name = "cache" if "cache" in names else "past_key_values"
        return GenerateDecoderOnlyOutput(sequences=ids, **{name: self.cache})


class Pace:
    """How many steps the next launch may have: doubled until a launch takes about as long as it should. step_s: seconds
    of a step, 0 while not known."""

    def __init__(self, fixed: int, short: bool, step_s: float = 0.0) -> None:
        self._fixed, self._aim = fixed, SHORT_LAUNCH_S if short else LAUNCH_S
        self.step_s, self._ended = step_s, 0.0
        self.steps = fixed or (max(1, int(self._aim / step_s)) if step_s else 1)

    def took(self, steps: int, begun: float, ended: float) -> None:
        """A launch of `steps` steps was made at `begun` and found to be over at `ended`, in seconds; it ran when the
        one before it was over."""
        seconds, self._ended = ended - max(begun, self._ended), ended
        if steps > 0:
            self.step_s = max(seconds, 1e-9) / steps
            if not self._fixed:
                self.steps = max(1, min(2 * self.steps, int(self._aim / self.step_s)))


def _pad(config: "GenerationConfig") -> int | None:
    pad = getattr(config, "_pad_token_tensor", None)
    return None if pad is None else int(pad)

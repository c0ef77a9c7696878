"""The conversations of every stage of a run, read and checked before any of them trains."""

from __future__ import annotations

import os
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import LlavaProcessor

from switchkd.config import Stage
from switchkd.data import Conversation, ConversationDataset
from switchkd.data.config import DataConfig
from switchkd.data.conversations.lost_pictures import warn_without_pictures
from switchkd.data.sources import ConversationSets, load_conversations
from switchkd.tasks.vlm_config import Run
from switchkd.training.held_out import hold_out


class StageData:
    """The samples of `stages`, encoded by `processor`.

    Stages of one data section share one set. The first process checks, the others read what it found.
    """

    def __init__(self, config: Run, stages: list[Stage], processor: LlavaProcessor):
        self.processor = processor
        self._sets: dict[DataConfig, ConversationDataset] = {}
        self._sources: dict[DataConfig, ConversationSets] = {}
        self._encoded: dict[DataConfig, list[dict[str, Any]]] = {}
        state = PartialState()
        for stage in stages:
            data = stage.data
            if data not in self._sets:
                self._sources[data] = source = load_conversations(data)
                with state.main_process_first():
                    self._sets[data] = ConversationDataset(
                        source.train,
                        processor,
                        data.max_length,
                        data.max_bad_rate,
                        cache=config.checks,
                        workers=min(16, os.cpu_count() or 1),
                    )
                state.print(f"{stage.name}: {len(self._sets[data]):,} training samples")
            if stage.method and state.is_main_process:
                warn_without_pictures(self._sets[data].conversations, stage.name)
            count = len(self._sets[data])
            if stage.train.eval_every:
                train, _ = hold_out(range(count), stage.train.eval_samples, f"{stage.field('train')}.eval_samples")
                count = len(train)
            stage.train.settled(count, state.num_processes)

    def questions(self, data: DataConfig) -> list[Conversation]:
        """The test questions of `data`, checked; [] where it names no test part."""
        test = self._sources[data].test
        if not test:
            return []
        return ConversationDataset(test, self.processor, max_bad_rate=data.max_bad_rate).conversations

    def samples(self, data: DataConfig) -> ConversationDataset | list[dict[str, Any]]:
        """The training samples of `data`, encoded once where it says so."""
        samples = self._sets[data]
        if not data.in_memory:
            return samples
        if data not in self._encoded:
            hidden = not PartialState().is_local_main_process
            order = tqdm(range(len(samples)), desc="encoding", unit="sample", disable=hidden)
            self._encoded[data] = [samples[index] for index in order]
        return self._encoded[data]

"""The typed face of ``_core.pyx``; checked by stubtest."""

import enum
from collections.abc import Buffer
from typing import Protocol, SupportsIndex

from pipeline._messages import Message
from pipeline.stats import FollowerStats, PipelineStats
from pipeline.types import SendResult

class Event(enum.IntEnum):
    CONNECT = 1
    CONNECT_FAILED = 2
    ANSWER = 3
    FAILED = 4
    SUCCEEDED = 5
    CLOSED = 6

class Given(enum.IntEnum):
    TO_LOOP = 0
    RETIRED = 1
    NOT = 2

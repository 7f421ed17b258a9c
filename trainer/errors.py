"""What the trainer raises. A message says what, which id, and what to do.

TrainerError
├── SampleError          a trace cannot be turned into samples (an open or eval run, a reward given twice)
├── PackingError         samples cannot be laid into rows (no context before the first token, wrong sizes)
├── BatchError           tensors of a step disagree in length, or nothing is left to train
├── UnsupportedModel     the checkpoint cannot be trained exactly (its attention ignores the mask, its head is unusual)
├── EngineError          the engine cannot be started, reached, or lacks what training needs
├── PublishError         new weights did not reach the engine, or could not be shown to have reached it
├── CheckpointError      a checkpoint is incomplete, or its hash is not the one in the ledger
├── StepRefused          an update, or what it left, was not finite or not bounded: nothing of it is committed
│   └── NothingToTrain   no choice of the batch may be trained: its runs are put aside
├── TrackingError        an experiment tracker is not installed, cannot be opened, or refused a step's numbers
├── WorkerFailed         a worker failed in a way that has no name here, or there is no room for it
│   └── WorkerDied       its process ended: what it held is in the last checkpoint
└── JobBusy              another trainer of the same job runs on this output folder
"""


class TrainerError(Exception):
    """Root of every error raised by `tracegrad.trainer`."""


class SampleError(TrainerError):
    """A trace cannot be turned into samples."""


class PackingError(TrainerError):
    """Samples cannot be laid into rows."""


class BatchError(TrainerError):
    """Tensors of a step disagree, or nothing is left to train."""


class UnsupportedModel(TrainerError):
    """The checkpoint cannot be trained exactly by this trainer."""


class EngineError(TrainerError):
    """The engine cannot be started, reached, or lacks what training needs."""


class PublishError(TrainerError):
    """New weights did not reach the engine, or could not be shown to have reached it."""


class CheckpointError(TrainerError):
    """A checkpoint is incomplete, or is not the one the ledger names."""


class StepRefused(TrainerError):
    """An update, or what it left, was not finite or not bounded: nothing of it is committed."""


class NothingToTrain(StepRefused):
    """No choice of the batch may be trained: its runs are put aside."""


class TrackingError(TrainerError):
    """An experiment tracker is not installed, cannot be opened, or refused a step's numbers."""


class WorkerFailed(TrainerError):
    """A worker failed in a way that has no name here, or there is no room for it."""


class WorkerDied(WorkerFailed):
    """The process of a worker ended: what it held is in the last checkpoint."""


class JobBusy(TrainerError):
    """Another trainer holds the job."""

"""The contract that every backend passes. Needs pytest.

A backend's test module subclasses `StoreContract` and gives two fixtures: `clock`, a `rows.Clock`, and `store`, an
empty store opened with that clock.
"""

from tracegrad.tracestore.testing.care import NameContract, RemovalContract, UpkeepContract
from tracegrad.tracestore.testing.chains import ChainContract
from tracegrad.tracestore.testing.continued import ContinuedContract
from tracegrad.tracestore.testing.diagnosis import (
    DiagnosisContract,
    JobDiagnosisContract,
    PayloadDiagnosisContract,
    SpanDiagnosisContract,
)
from tracegrad.tracestore.testing.diagnosis_groups import GroupDiagnosisContract
from tracegrad.tracestore.testing.gating import EvaluationContract, GateContract, PinContract
from tracegrad.tracestore.testing.judged_together import JudgedTogetherContract
from tracegrad.tracestore.testing.keys import KeyContract
from tracegrad.tracestore.testing.leased_spans import LeasedSpanContract
from tracegrad.tracestore.testing.ledger import LedgerContract
from tracegrad.tracestore.testing.overview import OverviewContract
from tracegrad.tracestore.testing.placing import (
    AttemptContract,
    AttributionContract,
    LangSmithContract,
    SpanContract,
)
from tracegrad.tracestore.testing.provenance import ProvenanceContract
from tracegrad.tracestore.testing.publishing import PublishContract, SilentPublisherContract, VersionContract
from tracegrad.tracestore.testing.queue import LeaseContract, ReadinessContract
from tracegrad.tracestore.testing.queue_view import QueueViewContract, RefusalContract, UnplacedContract
from tracegrad.tracestore.testing.retention import RetentionContract
from tracegrad.tracestore.testing.several_models import SeveralModelsContract
from tracegrad.tracestore.testing.staleness import StalenessContract
from tracegrad.tracestore.testing.traces import CallContract, RewardContract, TaskContract


class StoreContract(
    TaskContract,
    CallContract,
    ChainContract,
    ContinuedContract,
    RewardContract,
    SpanContract,
    AttributionContract,
    LangSmithContract,
    AttemptContract,
    ReadinessContract,
    StalenessContract,
    LeaseContract,
    LeasedSpanContract,
    LedgerContract,
    SeveralModelsContract,
    ProvenanceContract,
    QueueViewContract,
    RefusalContract,
    UnplacedContract,
    VersionContract,
    PublishContract,
    SilentPublisherContract,
    GateContract,
    EvaluationContract,
    PinContract,
    JudgedTogetherContract,
    OverviewContract,
    DiagnosisContract,
    GroupDiagnosisContract,
    JobDiagnosisContract,
    SpanDiagnosisContract,
    PayloadDiagnosisContract,
    KeyContract,
    RemovalContract,
    RetentionContract,
    UpkeepContract,
    NameContract,
):
    """Every test of the contract."""

"""What samples responses: vLLM, or a plain loop in PyTorch. Its door; who needs an engine imports this."""

from engines.choice import check_engine, make_engine
from engines.probes import check_probes, sample_probes
from engines.waking import awake

__all__ = ["awake", "check_engine", "check_probes", "make_engine", "sample_probes"]

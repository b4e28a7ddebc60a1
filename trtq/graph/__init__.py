"""GraphSurgeon passes: load, fold, place, rewrite."""

from onnx_graphsurgeon.logger.logger import G_LOGGER

G_LOGGER.severity = G_LOGGER.CRITICAL + 1  # its messages are not for users; what is fatal is raised, too

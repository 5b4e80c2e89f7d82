"""Evaluation: features, distances between sets of them, and one report for head, medium and tail."""

from imbdiff.evaluation.evaluate import evaluate
from imbdiff.evaluation.extractors import load_extractor
from imbdiff.evaluation.features import Extractor, Features, extract
from imbdiff.evaluation.folders import load_pair, save_images
from imbdiff.evaluation.memorisation import memorisation
from imbdiff.evaluation.report import Report
from imbdiff.evaluation.table import compare_table

__all__ = [
    "Extractor",
    "Features",
    "Report",
    "compare_table",
    "evaluate",
    "extract",
    "load_extractor",
    "load_pair",
    "memorisation",
    "save_images",
]

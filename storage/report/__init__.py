"""A sweep as one HTML file that opens without a network.

facts = gather(Store("results"), "digits", "pruned_train_loss", "best_test_accuracy", version)
text = page(facts, draw(facts), commands)
"""

from storage.report.reading import gather
from storage.report.rendering import Commands, draw, page

__all__ = ["Commands", "draw", "gather", "page"]

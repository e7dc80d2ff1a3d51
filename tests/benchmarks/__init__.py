"""`make bench`: what prunesweep costs, side by side with what it is compared to."""

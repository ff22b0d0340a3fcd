"""`hf-prune demo`: a real model, real reviews, three shapes, no training after the cut."""

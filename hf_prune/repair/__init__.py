"""What the remaining weights must become: closed-form solves, and the walk over the layers."""

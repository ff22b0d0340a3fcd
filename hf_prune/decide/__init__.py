"""What goes: costs, and the plan that loses least at a target."""

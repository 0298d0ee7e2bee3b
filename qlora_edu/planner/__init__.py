"""How the planner of chapter 6 knows: a training step without memory, and a trace of a real one."""

"""Ways to run a `StepPlan` on the ranks of a replica: inline, or over rank links (processes, Ray actors)."""

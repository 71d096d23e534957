"""Memory, time and cost of a staged run, from its run file alone, before any machine is asked for."""

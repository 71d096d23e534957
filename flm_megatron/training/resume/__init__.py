"""Where a run goes on and with what: `start.find_start` looks, `continuation` holds the run file against the past.

`changes` announces what is otherwise than before, `first_checkpoint` is what a new run starts from, `memory_copies` are
the copies at neighbours, `unfinished_save` ends what was being saved.
"""

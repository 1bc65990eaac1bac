"""Who the processes of a run are, how they agree, how they stop and what happens when one hangs."""

"""Several processes: launch.py starts them, sharding.py splits a model over them, deepspeed.py is the other engine."""

"""What torch and pyarrow import only once a run trains: before a fork it costs two seconds once, not in every child."""

import importlib

for _name in ("torch._dynamo", "torch.distributed.tensor", "pyarrow.compute", "pyarrow.dataset", "numpy.ma"):
    importlib.import_module(_name)

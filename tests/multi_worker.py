"What every process of tests/test_multi.py runs: the configs of a JSON list, one after the other. Arguments: list, processes, `fsdp` or nothing"
import json
import shutil
import sys
from pathlib import Path

from accelerate.utils import DistributedType

from srnb.align import RUNS
from srnb.training import from_config, processes


def main(configs:str, world:int, fsdp:bool)->None:
    state = processes()
    assert state.num_processes == world, state
    if fsdp: state._shared_state["distributed_type"] = DistributedType.MULTI_GPU # Accelerate cuts networks up on accelerators alone; the CPU can as well
    for config in json.loads(Path(configs).read_text()):
        function, cfg = from_config(config, RUNS)
        out = function(cfg)
        if not fsdp: continue
        state.wait_for_everyone()
        if state.is_main_process: # take the end away: the second call reads the checkpoint's pieces
            shutil.rmtree(out/"adapter"), shutil.rmtree(out/"after"), (out/"metrics.parquet").unlink()
        state.wait_for_everyone()
        function(cfg)


if __name__ == "__main__": main(sys.argv[1], int(sys.argv[2]), "fsdp" in sys.argv[3:])

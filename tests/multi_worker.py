"What each of the two processes of test_multi.py runs"
import shutil

from accelerate.utils import DistributedType

from srnb.align import RUNS
from srnb.training import from_config, processes


def work(
    config:dict,# of a run
    world:int,  # processes
    fsdp:bool,  # whether the network is cut up
)->None:
    "A run; with FSDP twice, the second time from the pieces of the last checkpoint"
    state = processes()
    assert state.num_processes == world, state
    # Accelerate cuts networks up on accelerators alone; the CPU can as well
    if fsdp: state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    function, cfg = from_config(config, RUNS)
    out = function(cfg)
    if not fsdp: return
    state.wait_for_everyone()
    if state.is_main_process: # take the end away
        for name in ("adapter", "after"): shutil.rmtree(out/name)
        (out/"metrics.parquet").unlink()
    state.wait_for_everyone()
    function(cfg)

"What each of the two processes of test_multi.py runs"
import shutil

from accelerate.utils import DistributedType

from srnb.train import from_json, train
from srnb.training import processes


def work(
    said:dict,  # JSON of a run
    world:int,  # processes
    fsdp:bool,  # whether the network is cut up
)->None:
    "A run; with FSDP twice, the second time from the pieces of the last checkpoint"
    state = processes()
    assert state.num_processes == world, state
    # Accelerate cuts networks up on accelerators alone; the CPU can as well
    if fsdp: state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    run = from_json(said)
    out = train(run)
    if not fsdp: return
    state.wait_for_everyone()
    if state.is_main_process: # take the end away
        for name in ("adapter", "bank-after", "control"): shutil.rmtree(out/name, ignore_errors=True)
        (out/"metrics.parquet").unlink(missing_ok=True)
    state.wait_for_everyone()
    train(run)

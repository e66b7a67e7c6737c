"""What calls and groups are called in spans: the functions of torch.distributed, and DDP's own.

Used by both processes.
"""

# The public functions, and the parameter whose bytes count as one rank's piece.
COLLECTIVES = {
    "all_gather": "tensor",
    "all_gather_coalesced": "input_tensor_list",
    "all_gather_into_tensor": "input_tensor",
    "all_gather_object": "",
    "all_gather_single": "input_tensor",
    "all_reduce": "tensor",
    "all_reduce_coalesced": "tensors",
    "all_to_all": "input_tensor_list",
    "all_to_all_single": "input",
    "barrier": "",
    "broadcast": "tensor",
    "broadcast_object_list": "",
    "gather": "tensor",
    "gather_into_tensor": "tensor",
    "gather_object": "",
    "gather_single": "tensor",
    "monitored_barrier": "",
    "reduce": "tensor",
    "reduce_scatter": "output",
    "reduce_scatter_single": "output",
    "reduce_scatter_tensor": "output",
    "scatter": "tensor",
    "scatter_object_list": "",
}
SENDS = {"send": "tensor", "isend": "tensor", "send_object_list": ""}
RECVS = {"recv": "tensor", "irecv": "tensor", "recv_object_list": ""}
ISSUED = ("irecv", "isend")  # they return before the work is done

# The root has what the others get, or gets what they have.
FROM_ROOT = ("broadcast", "broadcast_object_list", "scatter", "scatter_object_list")
TO_ROOT = ("gather", "gather_into_tensor", "gather_object", "gather_single", "reduce")

# All ranks must pass as much data of the same type, or the call fails or mixes up the numbers.
LIKE = (
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "broadcast",
    "gather", "gather_into_tensor", "gather_single", "reduce", "reduce_scatter",
    "reduce_scatter_single", "reduce_scatter_tensor",
)  # fmt: skip

# In which each rank exchanges data with the root only; in which the root's data is passed on.
DIRECT = ("gather", "gather_into_tensor", "gather_single", "scatter")
BY_TREE = ("broadcast", "broadcast_object_list", "scatter_object_list")

MAKES_GROUP = ("new_group", "split_group", "shrink_group")
JOINING = ("init_process_group", *MAKES_GROUP)
GROUP_CALLS = (*JOINING, "destroy_process_group")
SOME_RANKS = "some ranks"  # the group of a call that need not be made by all
OWN_WORLD = "own world of rank"  # in the name of a group: it is not known which ranks are in it

DDP_CALLS = {"backward", "DistributedDataParallel"}  # in which DDP makes its own collectives
WAIT_FOR_BUCKETS = "wait for buckets"  # the name of the span in which backward only waits

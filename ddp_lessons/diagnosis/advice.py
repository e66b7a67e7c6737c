"""Advice texts: hangs.py and failures.py end their verdicts with them, in the parent."""

ORDER = (
    "Every rank of a group must make the same calls in the same order. Look for the `if`, the "
    "`continue` or the early `return` that lets some ranks take another path."
)
ROOTS = (
    "In one call all ranks must name the same {root}: `{root}=0`, say, not `{root}=rank`. If they "
    "do, a rank has made one call too many or too few before: look for the `if`, the `continue` or "
    "the early `return` that does it."
)
TENSORS = (
    "All ranks must pass {op} a tensor of the same shape and dtype. Print x.shape and x.dtype on "
    "every rank before that line. The last, smaller batch of an epoch is a common reason: "
    "DataLoader(..., drop_last=True)."
)
MESSAGES = (
    "A recv needs a tensor of the shape and dtype that is sent. Where the receiver cannot know the "
    "shape, send that first, in a tensor of its own."
)
OBJECTS = (
    "An object sent by send_object_list must be received by recv_object_list; tensors use send "
    "and recv."
)
MISSING = (
    "A collective returns only when every rank of its group has called it. Look for the `if`, the "
    "early `return` or the exception that keeps the missing rank from calling it."
)
PLAIN_DATA = "Return plain data instead: numbers, strings, lists, tensors, state_dict()."
INSTALL = "Or install in this environment what its class comes from."
LESS = "Save it to a file in the rank, or return less of it."
MORE_FILES = (
    "Allow this process more open files (ulimit -n), or return less: of each value from 32 MB on, "
    "one file stays open here while it is used."
)
HANDLED = (
    "An exception that a rank handles alone keeps it from the others' calls. Let it end the rank; "
    "or have the ranks agree what to do, by an all_reduce of a flag in every step."
)
COUNTED = (
    "Under TORCH_DISTRIBUTED_DEBUG=DETAIL torch counts the sends and recvs of a group, too, and "
    "expects the same number on every rank. Unset it, or give the ranks that send a group of their "
    "own: new_group([0, 1])."
)
SWALLOWED = (
    "{line} is in a `try`, and an exception that {them} caught at line {handler} would have left "
    "it out. If so, let it end the rank, or have the ranks agree what to do. Python 3.12 and later "
    "would tell what was caught."
)
BATCHES = (
    "It seems that some ranks have fewer batches than others. {join}DistributedSampler gives every "
    "rank the same number; a stream must be cut to what the shortest rank has, or repeated to the "
    "longest; or, before each step, let an all_reduce of a flag tell whether every rank still has "
    "a batch."
)
OR_BATCHES = (
    "Or the ranks have different numbers of batches: {join}DistributedSampler gives every rank the "
    "same number."
)
JOIN = "Join([model]) lets ranks that have run out of batches keep up with the others. "
DECISION = (
    "A rank has {did}, or has no more batches. Let all ranks decide together: an all_reduce of a "
    "flag in every step tells whether any rank wants to {do}, or has no batch."
)
LEFT_LOOP = DECISION.format(did="left the loop (by a `break`, say)", do="stop")
LEFT_OUT_STEP = DECISION.format(
    did="left out a step (by a `continue`, an `if` or an `except`, say)", do="skip this one"
)
LEFT_EITHER = DECISION.format(
    did="left the loop (by a `break`, say) or left out a step (by a `continue`, say)",
    do="stop or to skip this one",
)
ONLY_BATCHES = "If it has only run out of batches, Join([model]) lets it keep up with the others."
SYNC_BATCHNORM = (
    "In training mode SyncBatchNorm calls collectives in forward and in backward, and every rank "
    "must take part. What a rank does alone, such as validation, needs eval mode: model.eval(), "
    "then model.module; or let all ranks do it."
)
SHARDS = (
    "A rank has only its shards, so forward, backward, full_tensor(), clip_grad_norm_ and saving "
    "by torch.distributed.checkpoint communicate: all ranks must call them. Only what is done with "
    "the result, such as printing it, may be left to rank 0."
)
PIPELINE = "All stages must run the same kind of schedule, with the same number of micro-batches."
JOINING = (
    "init_process_group returns when every rank has called it. Look for the `if`, the early "
    "`return` or the long work before it that keeps the missing rank away."
)
STORE = (
    "Rank 0's process keeps the store by which ranks make groups, so it must not end while others "
    "still do. Have all ranks meet before they end: dist.barrier()."
)
LATE = (
    "The errors come from the ranks that were on time{late}. Is the late one slower, or does it "
    "have more to do? Else raise the timeout."
)
FOUND_GONE = ", and from the late one, which found the others gone"
SAME_CALL = (
    "All of them make the same call. Do their tensors have the same shape and dtype, and did all "
    "of them make the same calls before?"
)
ALONE = "The run has a single rank (nprocs=1), so there is no other rank to take part."
DDP = (
    "DistributedDataParallel calls collectives of its own, and every rank must take part: it "
    "broadcasts buffers in forward, also under no_grad and in eval(), and averages gradients in "
    "backward. What a rank does alone, such as validation, must go through model.module."
)
SLOW = (
    "If a rank is slow rather than stuck, let it make progress that shows: a printed line, or a "
    "span() that ends. Or raise launch(timeout=...); None means no limit."
)
IDLE = "An idle rank uses no processor time: it waits for a lock, a queue, a thread or the clock. "
THREADS = (
    "A rank's process, like any script, ends only after its threads. Stop and join() the thread "
    "before the function returns, or start it as Thread(..., daemon=True), for which no process "
    "waits. "
)
TWO_THREADS = (
    "What two threads call in one group reaches the other ranks in no fixed order. Give the thread "
    "a group of its own: dist.new_group()."
)
DEAD_THREAD = (
    "An exception in a thread ends only that thread, and its rank goes on without it. Start it "
    "with ThreadPoolExecutor.submit: result() raises the exception in the main thread."
)
HANDLERS = "A rank's process, like any script, runs its atexit handlers before it ends. "
CHILDREN = (
    "A rank's process, like any script, waits for the processes that it started with "
    "multiprocessing, unless they are daemons: stop and join() them before the function returns. "
)
SUSPENDED = (
    "SIGSTOP suspends a process until SIGCONT: `kill -CONT`, or `fg` in the terminal. Another "
    "process sent it, or the rank itself."
)
LEFT = (
    "destroy_process_group is for the very end: no rank may call it while others still communicate."
)
IN_C = "It did not print its stack: it is busy in C code, or it gets no processor. "
NETWORK = (
    "All ranks came to this call, but it never ended. The likely cause is the network between the "
    "machines: do they still reach each other (ping), and does GLOO_SOCKET_IFNAME or "
    "NCCL_SOCKET_IFNAME name an interface that leads there?"
)
RECORD = "A record has the calls of torch.distributed, not where a rank is between them. "
MOMENT = "Look again later: if the ranks stand elsewhere then, the job does not hang."
PY_SPY = "`py-spy dump --pid {rank.pid}` on {rank.host} shows where rank {rank.rank} is now."
GROUPS = (
    "Ranks that share two groups must use them in the same order: while one waits in the first "
    "group, the other waits in the second. Choose one order for all, and see that no rank leaves a "
    "call out."
)
PLACE = (
    "{ranks} were launched. Does world_size= or WORLD_SIZE say the same, does every rank have its "
    "own number, and do all of them use the same address or file?"
)
SENDS_FIRST = (
    "A send may wait until its recv has begun, and here all of them send first. Start with isend "
    "and wait for it after the recv, or let some ranks receive first."
)
RECEIVES_FIRST = (
    "A recv waits for its send, and here all of them receive first. Send before receiving, or "
    "start with irecv and wait for it after the send."
)
CIRCLE = (
    "What one rank waits for, the next would do later, and so on in a circle. Write down for each "
    "rank, in order, what it sends and receives: neighbours must do it in matching order."
)
STAGES = (
    "In a pipeline, that is the order of forwards and backwards, and the number of micro-batches."
)
PAIRS = (
    "Each send needs one recv on the rank that it names, with the same tag, and each recv one "
    "send. Check dst=, src= and tag=, and the order of the calls on both ranks."
)
NO_NCCL = (
    "NCCL works only between NVIDIA's GPUs, and only in a build of torch that has it. Join with "
    'dist.init_process_group("gloo"); recommend_backend(nprocs) tells what suits this machine.'
)
ONE_GPU = (
    "Two ranks are on one GPU. Every rank chooses its own before it joins: "
    'torch.cuda.set_device(int(os.environ["LOCAL_RANK"])). Where ranks must share a GPU, use gloo.'
)
ON_GPU = (
    "The line at fault may be an earlier one: calls return before the GPU has done the work. "
    'With launch(..., env={"CUDA_LAUNCH_BLOCKING": "1"}) each call waits for the GPU, so the '
    "traceback ends at the right line."
)
NO_GPU = (
    "torch can use no GPU here. Keep model and tensors on the CPU: no .cuda(), no "
    "torch.cuda.set_device, and DDP(model) without device_ids."
)
NO_SYNC_ON_CPU = (
    "torch's SyncBatchNorm needs a GPU. ddp_lessons.syncbn.convert_sync_batchnorm(model) makes one "
    "that computes the same on the CPU."
)
NO_KEYBOARD = (
    "A rank has no keyboard. To step through the function, run it as the only rank in this very "
    "process: launch(fn, args, nprocs=1, in_process=True). To see the variables where a rank "
    "failed: launch(..., post_mortem=True)."
)
REMEDIES = {  # error texts of torch, CUDA and NCCL, and what to try
    "bdb.BdbQuit": NO_KEYBOARD,
    "EOF when reading a line": NO_KEYBOARD,
    "is not part of group": (
        "src= and dst= are ranks of the world, also in a subgroup. group_src= and group_dst= count "
        "within the group."
    ),
    "trying to initialize the default process group twice": (
        "A rank joins once. Ask dist.is_initialized() first, or leave with "
        "dist.destroy_process_group()."
    ),
    "Default process group has not been initialized": (
        "Every rank calls dist.init_process_group before it communicates, and communicates no more "
        "after dist.destroy_process_group."
    ),
    "Expected timeout argument to be of type datetime.timedelta": (
        "Give the time as timeout=datetime.timedelta(seconds=...)."
    ),
    "EADDRINUSE": (
        "Another process listens on this port. Leave MASTER_PORT to launch(), which takes a free "
        "one for every run."
    ),
    "SyncBatchNorm expected input tensor to be on": NO_SYNC_ON_CPU,
    "SyncBatchNorm layers only work with GPU modules": NO_SYNC_ON_CPU,
    "Expected more than 1 value per channel when training": (
        "BatchNorm needs at least two values of each channel on every rank. A last batch of one "
        "sample is the usual reason: DataLoader(..., drop_last=True)."
    ),
    "DataLoader worker (pid": (
        "A worker of the DataLoader died. With num_workers=0 the dataset's own error shows; if "
        "memory ran out, use fewer workers."
    ),
    "on <module '__main__'": (
        "A rank does not run the script or notebook again. Of it, it knows what the function uses, "
        "and small classes and functions. Move the rest into a module of its own, and import that."
    ),
    "Torch not compiled with CUDA enabled": NO_GPU,
    "'torch._C' has no attribute '_cuda_": NO_GPU,
    "No CUDA GPUs are available": NO_GPU,
    "Found no NVIDIA driver": NO_GPU,
    "device_ids and output_device arguments only work with": NO_GPU,
    "doesn't have NCCL built in": NO_NCCL,
    "no GPUs found": NO_NCCL,
    "Duplicate GPU detected : ": ONE_GPU,
    "Multiple Ranks are using the same GPU": ONE_GPU,
    "CUDA error: ": ON_GPU,
}

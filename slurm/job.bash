# --- shared by all jobs (slurm/job.bash) ---------------------------------------------------------------------------

say() { echo "$(date -u +%FT%TZ) job $SLURM_JOB_ID: $*"; }

# torchrun's names for a rank's place win over Slurm's (megavar/parallel/environment.py). A shell that is itself a rank
# passes its own on when it submits: every task would then be a run of its own, or wait for torchrun's store.
unset RANK LOCAL_RANK WORLD_SIZE "${!TORCHELASTIC_@}"

# The newest numbered step that still runs: preflight is step 0, the ranks are step 1.
running_step() {
    scontrol show step "$SLURM_JOB_ID" 2>/dev/null | sed -n "s/^StepId=\($SLURM_JOB_ID\.[0-9][0-9]*\) .*/\1/p" | tail -n 1
}

# Slurm signals only this shell (--signal=B:USR1). The ranks get USR2, because NCCL may use USR1 itself; they agree on
# one step, save and leave. A step that is still being created cannot be signalled: then try again.
srun_process=
terminated=0
forward_stop() {
    stop_requested=1
    local step
    while [ -n "$srun_process" ] && kill -0 "$srun_process" 2>/dev/null && [ "$terminated" = 0 ]; do
        step=$(running_step)
        if [ -n "$step" ] && scancel --signal=USR2 "$step"; then
            say "asks step $step to save and stop"
            return
        fi
        sleep 1
    done
}
trap forward_stop USR1
trap 'terminated=1' TERM

# Run srun in the background, so that traps run at once, and return its status. A wait that a trap cuts short returns
# 128 + signal; the one after the loop returns the status of srun. After SIGTERM (cancelled, or past the time limit) all
# processes have KillWait, perhaps 30 s, to live: soon stop waiting for the ranks, because what follows must still run.
run_step() {
    if [ "$stop_requested" = 1 ]; then return 0; fi
    srun --kill-on-bad-exit=1 --export=ALL "$@" & # ALL: also where sbatch was told to pass on nothing
    srun_process=$!
    if [ "$stop_requested" = 1 ]; then forward_stop; fi # it came in between
    local patience=3 status
    while kill -0 "$srun_process" 2>/dev/null; do
        if [ "$terminated" = 0 ]; then
            wait "$srun_process"
        elif [ "$patience" -gt 0 ]; then
            sleep 1
            patience=$((patience - 1))
        else
            return 143
        fi
    done
    wait "$srun_process"
    status=$?
    srun_process=
    return "$status"
}

# Cancels the queued jobs of this run: only this user's, only under this run's own job name, never a running one.
cancel_chain() {
    scancel --user="$(id -un)" --name="$SLURM_JOB_NAME" --state=PENDING
}

# Keeps the run in the queue for a person, where this job cannot even keep its books.
hold_run() {
    if [ "$continue_by" = requeue ] && { [ "$terminated" = 0 ] || [ "$stop_requested" = 1 ]; }; then
        say "is held in the queue. Mend what is named above, then: scontrol release $SLURM_JOB_ID"
        scontrol requeuehold "$SLURM_JOB_ID"
    fi
}

# Sets MASTER_ADDR and MASTER_PORT.
rendezvous() {
    local found
    found=$("$host_python" -m launchers.rendezvous) || return
    read -r MASTER_ADDR MASTER_PORT <<<"$found"
    export MASTER_ADDR MASTER_PORT
}

# Compiler caches belong on the node's own disk: network file systems fail with stale handles under many ranks. They are
# removed before the job leaves its nodes, which it does when it is requeued, too. A node may be dead: not for ever.
node_cache=$node_local_directory/megavar-$(id -u)-$SLURM_JOB_ID
export TRITON_CACHE_DIR=$node_cache/triton TORCHINDUCTOR_CACHE_DIR=$node_cache/inductor
remove_node_cache() {
    if [ "$terminated" = 1 ]; then return; fi # no step can start any more
    timeout --kill-after=5 30 srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 rm -rf -- "$node_cache" 2>/dev/null
}
# --- end of slurm/job.bash -----------------------------------------------------------------------------------------

# --- shared by all jobs (slurm/job.bash) ---------------------------------------------------------------------------

say() { echo "$(date -u +%FT%TZ) job $SLURM_JOB_ID: $*"; }

# The newest numbered step that still runs: preflight is step 0, the ranks are step 1.
running_step() {
    scontrol show step "$SLURM_JOB_ID" 2>/dev/null | sed -n "s/^StepId=\($SLURM_JOB_ID\.[0-9][0-9]*\) .*/\1/p" | tail -n 1
}

# Slurm signals only this shell (--signal=B:USR1). The ranks get USR2, because NCCL may use USR1 itself; they agree on
# one step, save and leave.
stop_forwarded=0
terminated=0
forward_stop() {
    stop_requested=1
    local step
    step=$(running_step)
    if [ -n "$step" ]; then
        say "asks step $step to save and stop"
        scancel --signal=USR2 "$step" && stop_forwarded=1
    fi
}
trap forward_stop USR1
trap 'terminated=1' TERM

# Run srun in the background, so that traps run at once, and return its status. The first wait after a trap returns
# 128 + signal; the one after the loop returns the status of srun.
run_step() {
    if [ "$stop_requested" = 1 ]; then return 0; fi
    srun --kill-on-bad-exit=1 "$@" &
    local step=$!
    while kill -0 "$step" 2>/dev/null; do
        wait "$step"
        if [ "$stop_requested" = 1 ] && [ "$stop_forwarded" = 0 ]; then sleep 1; forward_stop; fi
    done
    wait "$step"
}

# Cancels the queued jobs of this run: only this user's, only under this run's own job name, never a running one.
cancel_chain() {
    scancel --user="$(id -un)" --name="$SLURM_JOB_NAME" --state=PENDING
}

# Sets MASTER_ADDR and MASTER_PORT.
rendezvous() {
    local found
    found=$("$host_python" -m launchers.rendezvous) || return
    read -r MASTER_ADDR MASTER_PORT <<<"$found"
    export MASTER_ADDR MASTER_PORT
}

# Compiler caches belong on the node's own disk: network file systems fail with stale handles under many ranks.
node_cache=$node_local_directory/megavar-$(id -u)-$SLURM_JOB_ID
export TRITON_CACHE_DIR=$node_cache/triton TORCHINDUCTOR_CACHE_DIR=$node_cache/inductor
remove_node_cache() {
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 rm -rf -- "$node_cache" 2>/dev/null
}
# --- end of slurm/job.bash -----------------------------------------------------------------------------------------

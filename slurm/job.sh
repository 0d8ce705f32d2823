# What the scripts of this directory share: where things are, attempts and their logs, starting, leaving, coming back.
#
# A script sets NAME and LEAVE (the signal that tells its processes to go), defines progress (prints a number that grows
# while the work gets on), calls begin, then launch with a Python program, which does not return.
#
#   logs/<job>/attempt_N/   what attempt N printed (all.log, also in the Slurm log) and the exit codes of its ranks
#   logs/<job>/latest       a link to the newest one
#
# MAX_STALLED (3): so many attempts in a row without progress end the job for good.

set -uo pipefail
MAX_STALLED=${MAX_STALLED:-3}
ATTEMPT=$((${SLURM_RESTART_COUNT:-0} + 1))
# of an array's task: its job id alone may stand for the whole array
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
NODES=$SLURM_JOB_NUM_NODES
GPUS=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}   # ranks a node
LOGS=$G2R_HOME/logs/$SLURM_JOB_NAME-$JOB
LOG=$LOGS/attempt_$ATTEMPT

say() { echo "$NAME: $*"; }
stop() { say "$1" >&2; exit "$2"; }

# The last value of option $1 (without its dashes) among the arguments after it.
option() {
    local name=$1 value=; shift
    while [ $# -gt 0 ]; do
        case ${1//-/_} in
            "__$name="*) value=${1#*=} ;;
            "__$name") value=${2-} ;;
        esac
        shift
    done
    echo "$value"
}

begin() {
    cd "$G2R_HOME" || stop "no directory $G2R_HOME" 2
    source "${G2R_ENV:-slurm/env.sh}"
    mkdir -p "$LOG/exit_codes" && ln -sfn "attempt_$ATTEMPT" "$LOGS/latest" || stop "cannot write $LOGS" 2
    leaving= step=
    trap 'leaving=1; tell_step' USR1   # from --signal, before the time limit, or from: scancel --batch --signal=USR1
    trap : TERM                        # from Slurm, which has told the step as well: wait for it
    if [ "$ATTEMPT" -gt 1 ]; then check_progress; fi
    progress >> "$LOGS/progress"       # one line an attempt: where it began
    say "attempt $ATTEMPT on $NODES x $GPUS ranks ($SLURM_JOB_NODELIST), logs in $LOG"
}

# Ends the job if the last MAX_STALLED attempts have all begun where we are now.
check_progress() {
    local now stalled
    now=$(progress)
    stalled=$(tail -n "$MAX_STALLED" "$LOGS/progress" 2>/dev/null | grep -cx "$now")
    if [ "$stalled" -ge "$MAX_STALLED" ]; then
        stop "stopped: $MAX_STALLED attempts without progress (all began at $now); see $LOGS, then submit again" 1
    fi
}

# A command on one node, with the software of env.sh.
once() { srun --nodes=1 --ntasks=1 --cpu-bind=none "${G2R_SRUN[@]}" "${G2R_EXEC[@]}" "$@"; }

# A Python program (-m MODULE or FILE) on every GPU of every node; decides what becomes of the job when it has ended.
launch() {
    local code tee
    [ -z "$leaving" ] || finish 1
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export G2R_ATTEMPT=$ATTEMPT G2R_EXIT_CODES=$LOG/exit_codes
    # torchrun, told by nobody: the ranks get Slurm's signals themselves and take the time they need, and only then
    # does it end. When a rank has died it ends the others of its node after 10 s, and srun those of the other nodes.
    export PET_SIGNALS_TO_HANDLE=SIGINT TORCH_ELASTIC_SHUTDOWN_TIMEOUT=10
    exec 3> >(trap '' TERM INT USR1; exec tee -a "$LOG/all.log"); tee=$!
    srun --label --kill-on-bad-exit=1 --cpu-bind=none "${G2R_SRUN[@]}" \
        bash -c 'if [ "$0" = USR1 ]; then trap "" USR1 TERM; fi; export PET_NODE_RANK=$SLURM_NODEID; exec "$@"' "$LEAVE" \
        "${G2R_EXEC[@]}" python -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$GPUS" \
        --master-addr="$MASTER_ADDR" --master-port=$((20000 + (SLURM_JOB_ID * 7 + ATTEMPT) % 10000)) \
        "$@" >&3 2>&3 3>&- &
    step=$!
    exec 3>&-
    [ -z "$leaving" ] || tell_step
    wait_for_step
    wait "$tee" 2>/dev/null
    finish "$code"
}

# Tell the step to leave, and again every 30 s: a rank that is still starting does not hear it yet.
tell_step() {
    [ -n "$step" ] || return 0
    say "asked to leave (attempt $ATTEMPT)"
    kill -"$LEAVE" "$step" 2>/dev/null
    (trap - USR1 TERM; while sleep 30 && kill -"$LEAVE" "$step" 2>/dev/null; do :; done) & again=$!
}

# Sets code, of the step. `wait` returns early, with a code of its own, whenever a signal arrives.
wait_for_step() {
    wait "$step"; code=$?
    while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
    if [ -n "${again-}" ]; then kill "$again" 2>/dev/null; fi
}

# What becomes of the job, from its code and those of its ranks: 2 is bad input, 3 was ended by an alarm, 75 has left and
# wants to come back.
finish() {
    if grep -qsx 2 "$LOG"/exit_codes/*; then stop "bad input (see the error above): not started again" 2; fi
    if grep -qsx 3 "$LOG"/exit_codes/*; then stop "ended by an alarm (see the error above): not started again" 3; fi
    case $(fate) in
        "RUNNING "*) ;;
        *" TimeLimit") leaving=1 ;;
        *) stop "ended by Slurm" 1 ;;   # scancel; or a dead node: then Slurm itself puts the job back into the queue
    esac
    if grep -qsx 75 "$LOG"/exit_codes/*; then
        say "left; coming back"
    elif [ "$1" = 0 ]; then
        say "finished in attempt $ATTEMPT"; exit 0
    elif [ -n "$leaving" ]; then
        say "ended when asked to leave; coming back"
    else
        say "failed with code $1"
    fi
    check_progress
    trap - TERM USR1
    scontrol requeue "$JOB" || stop "Slurm does not take the job back: submit it again" 1
    sleep 120   # Slurm ends this shell before that
}

# The job's state and the reason for it, e.g. RUNNING None. Known before any process of a job is told to end.
fate() { (trap '' TERM; scontrol show job -o "$JOB") | sed -n 's/.* JobState=\([A-Z_]*\) Reason=\([A-Za-z]*\).*/\1 \2/p'; }

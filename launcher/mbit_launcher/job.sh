# ---------------------------------------------------------------- the same for every job from here on
# Starts one attempt, waits for it, and goes back into the queue until the run is finished. What to do is decided by
# modules of mbit_launcher, from files in the run folder; this script talks to SLURM and passes signals on.
set -uo pipefail  # no -e: what fails is looked at

[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || submission=${submissions[$SLURM_ARRAY_TASK_ID]}
token=${1:-}  # by which `submit` knows this job, should its number get lost
# Of an array, this task: the number of the last one is that of the array, and means all of them to SLURM's commands.
queued=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
queued=${queued:-$SLURM_JOB_ID}
attempt=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
logs=$submission/logs/$attempt
mkdir -p "$logs"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
nodes=$(IFS=,; echo "${hosts[*]}")

export SLURM_EXPORT_ENV=ALL  # sbatch got --export=NONE, which would empty the environment of srun's tasks, too
export MASTER_ADDR=${hosts[0]}
export MASTER_PORT=$(( 20000 + SLURM_JOB_ID % 10000 ))  # below the ephemeral ports; two jobs on a host differ
threads=$(( ${SLURM_CPUS_PER_TASK:-1} / ranks_per_node ))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( threads > 0 ? threads : 1 ))}
export MBIT_ATTEMPT=$attempt PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export PYTHONSAFEPATH=1  # `python -m` would put the working folder on sys.path, and a checkout has a folder kernels/

say() { echo "$(date '+%F %T') $*"; }

# A controller that was started a moment ago takes nodes for busy until they have reported; srun alone would then ask it
# again only after two minutes.
each_node=(--immediate=20 --ntasks-per-node=1 --kill-on-bad-exit=1 --open-mode=append "${container[@]}")
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || each_node+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
here=()  # in front of what runs on this node alone
(( ${#container[@]} == 0 )) || here=(ask srun --overlap --nodes=1 --ntasks=1 "--nodelist=$SLURMD_NODENAME" "${container[@]}")
launcher() { "${here[@]}" "$python" -m "mbit_launcher.$1" "${@:2}"; }

# The exit code of a process, when it is gone: bash's `wait` returns early, with 128 and more, when a trap has run.
wait_for() {
    local status
    while true; do
        status=0
        wait "$1" || status=$?
        (( status > 128 )) && kill -0 "$1" 2>/dev/null && continue
        (( status > 128 )) || return "$status"
        wait "$1"  # it ended while the trap ran, or by a signal of its own: bash remembers which
        return
    done
}

# SLURM's controller may be away for a while: a restart, a flood of jobs. Its silence says nothing, neither that this job
# is gone nor that what it was asked for is not done. It is asked again for as long as this job lives: who cannot be
# asked does not end jobs, either.
SILENT=201  # an exit code that nothing here has
since=''  # when the silence began

# Runs a command once, with stdout in $said.out and stderr in $said.err. Returns its exit code, or SILENT.
once() {
    local status=0
    said=$logs/.said-$BASHPID
    "$@" >"$said.out" 2>"$said.err" &
    wait_for $! || status=$?
    answered "$1" "$status" "$said.err"
}

# Whether a command ($1) that ended with $2 and said $3 (a file) was answered: $2, or SILENT if not.
answered() {
    local words=$silence
    # of srun only what it could not start: later it speaks of nodes, and one that is silent is lost
    [[ $1 != *srun ]] || words="^srun: (.*(allocation|create step|step creation).*($silence|nodes are busy)|Cancelled pending job step)"
    if (( $2 )) && grep -qiE "$words" "$3" && ! grep -q '^srun: Step created' "$3"; then
        if [[ -z $since ]]; then
            since=$SECONDS
            say "SLURM does not answer ($(grep -iE "$words" "$3" | head -n 1)): asking again for as long as this job lives"
        fi
        return $SILENT
    fi
    if [[ -n $since ]]; then
        say "SLURM answers again, after $(( SECONDS - since )) s"
        since=''
    fi
    return "$2"
}

# A question to SLURM itself: none takes longer than a minute.
question() {
    local status=0
    timeout --kill-after=5 60 "$@" || status=$?
    (( status != 124 && status != 137 )) || echo "$1: timed out after 60 s" >&2
    return "$status"
}

# Growing pauses, and short ones where SLURM will end the job soon. A signal ends one.
rest() {
    local most=60
    (( ! stopping && SECONDS + 300 < limit_seconds )) || most=10
    pause=$(( 2 * pause < most ? 2 * pause : most ))
    sleep "$pause" &
    wait $!
    kill $! 2>/dev/null
}

# Runs a command until it is answered, and lets it be seen what it said.
ask() {
    local pause=1 status
    while true; do
        status=0
        once "$@" || status=$?
        (( status == SILENT )) || break
        rest
    done
    cat "$said.out"
    cat "$said.err" >&2
    rm -f "$said.out" "$said.err"
    return "$status"
}

# What the one task of each node runs: torchrun, whose ranks write RUN/slurm/.../rank-00003.NODE.log.
#
# The ranks have to get signals; torchrun must not, it dies of USR1 and takes the ranks with it. What a signal to a
# SLURM step reaches depends on the cluster: with proctrack/cgroup only the task, this shell; with proctrack/linuxproc
# or pgid every process below it. Both are covered:
# - torchrun is started with USR1 and USR2 ignored; the ranks inherit that until they install their own handlers.
# - this shell passes signals on to the children of its own torchrun. These are the ranks, by parent, so that no other
#   job of yours on this node can be meant. A rank that gets USR1 twice only sets its flag twice.
# Once asked to stop, the ranks save and exit with 85, of which torchrun makes a failure: it is none, so return 0, or
# --kill-on-bad-exit would kill the nodes that are still writing.
on_node() {
    local agent asked=0 status=0
    trap '' USR1 USR2
    # shellcheck disable=SC2016  # for the shell of each rank
    "$python" -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" \
        --nproc-per-node="$ranks_per_node" --rdzv-backend=static --master-addr="$MASTER_ADDR" \
        --master-port="$MASTER_PORT" --max-restarts=0 --no-python \
        bash -c 'exec "$@" >>"$(printf "%s/rank-%05d.%s.log" "$0" "$RANK" "$SLURMD_NODENAME")" 2>&1' "$logs" \
        "$python" -m megatron_bit train "$submission/config.yaml" &
    agent=$!
    trap 'asked=1; pkill -USR1 -P "$agent"' USR1
    trap 'asked=1; pkill -TERM -P "$agent"' TERM  # scancel and preemption: save as well, if the cluster leaves the time
    trap 'pkill -USR2 -P "$agent"; sleep 3; pkill -KILL -P "$agent"' USR2  # they hang: stacks, and the end
    wait_for "$agent" || status=$?
    (( asked )) || return "$status"
}

# What SLURM has of this job into `state` and `restarts`, however long it takes to answer; state '': no such job any more.
look() {
    local pause=1 status
    for _ in 1 2 3 4 5; do
        while true; do
            status=0
            once question squeue --noheader "--jobs=$queued" --Format=state,restartcnt || status=$?
            (( status == SILENT )) || break
            rest
        done
        state='' restarts=''
        if (( status == 0 )); then
            read -r state restarts <"$said.out"
            return
        fi
        ! grep -qi "invalid job id" "$said.err" || return
        cat "$said.err" >&2
        sleep 2
    done
    say "squeue cannot be asked here: taking this job for one that runs"
    state=RUNNING restarts=${SLURM_RESTART_COUNT:-0}
}

# Back into the queue, once: a request whose answer got lost may have been carried out.
requeue_job() {
    local pause=1 status
    while true; do
        status=0
        once scontrol requeue "$queued" || status=$?  # see `again`
        (( status )) || return 0
        (( status == SILENT )) || cat "$said.err" >&2
        rest
        look
        [[ $state == RUNNING && $restarts == "${SLURM_RESTART_COUNT:-0}" ]] || return 0
        (( status == SILENT )) || return 1
    done
}

# Back into the queue, without the nodes that are known to be bad.
again() {
    if (( ! requeue )); then
        say "the next job of the chain goes on"
        exit 0
    fi
    [[ $state == RUNNING ]] || exit 1  # cancelled, or requeued by SLURM itself
    trap '' TERM  # requeue ends this script; it has one thing left to do
    local bad
    bad=$(sed 's/#.*//; s/[[:space:]].*//; /^$/d' "$cordon" 2>/dev/null | sort -u | paste -sd,)
    if ! requeue_job; then
        say "this cluster does not requeue jobs: use \`megatron-bit chain\`"
        exit 1
    fi
    # no `question`: SLURM tells all processes of this script to go, and `timeout` would take what it runs along
    [[ -z $bad ]] || ask scontrol update "JobId=$queued" "ExcNodeList=${exclude:+$exclude,}$bad"
    exit 0
}

# Write down how the attempt ended ($1: exit code of its step), and leave or go back into the queue.
finish() {
    local verdict=0
    look
    launcher attempts end "$submission" "$attempt" "$1" "$state" "$stopping" || verdict=$?
    (( verdict == 85 )) && again
    exit "$verdict"
}

# Runs a function beside this script, in a process group of its own, whose number is in $!.
helper() {
    local before=$-
    set -m
    "$@" &
    [[ $before == *m* ]] || set +m  # a signal's trap that starts a helper may have come in between
}

# Ends a helper with all that it has started. By process group: one that is just starting something would leave that
# behind, which then holds this job's output open. More than once: a shell that has just begun still has our traps.
end_helper() {
    local i
    for (( i = 0; i < 20; i++ )); do
        kill -TERM -- "-$1" 2>/dev/null
        (( ! i )) || kill -0 "$1" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL -- "-$1" 2>/dev/null
}

# If the ranks hang, the job has to be back in the queue before SLURM ends it at its limit.
end_at_last_call() {
    sleep "$last_call"
    say "the ranks have not stopped in $last_call s"
    kill -KILL "$step" 2>/dev/null
}

stopping=0 step='' patience='' guard='' state=''
stop() {
    (( stopping )) && return
    stopping=1
    say "asked to stop: the ranks save"
    [[ -n $step ]] || return
    kill -USR1 "$step" 2>/dev/null  # srun passes USR1 on to its tasks
    helper end_at_last_call
    patience=$!
}
trap stop USR1
trap 'rm -f "$logs/.said-$BASHPID".*' EXIT  # its own: a helper that is killed while it starts still has this trap
trap 'stopping=1' TERM  # scancel and preemption tell the steps themselves; stay alive to see what to do

# Ends the attempt if it hangs, and asks it to stop if there is a file STOP.
watchdog() {
    local verdict=0
    launcher watch "$submission" "$attempt" || verdict=$?
    case $verdict in
        3) kill -USR2 "$step"; sleep 20; kill -KILL "$step" ;;
        4) kill -USR1 $$ ;;
        *) say "the watchdog has ended with $verdict: hangs and STOP are not seen" ;;
    esac
}

launcher attempts begin "$submission" "$attempt" "$SLURM_JOB_ID" "$nodes" "$token" "$queued"
case $? in
    0) ;;
    3) rmdir "$logs"; exit 0 ;;
    *) exit 1 ;;
esac

preflight_srun() {
    timeout "$preflight_seconds" srun "${each_node[@]}" \
        "$python" -m mbit_launcher.preflight node "$submission" "$attempt" "$(date +%s.%N)"
}

if (( preflight_seconds )); then
    pause=1 status=$SILENT
    while (( status == SILENT && ! stopping )); do
        status=0
        once preflight_srun || status=$?
        if (( status == SILENT )); then rest; else cat "$said.out" "$said.err"; fi
    done
    (( status == SILENT )) && finish 0  # asked to stop before it was answered
    launcher preflight judge "$submission" "$attempt" "$nodes" || finish 1
fi

export submission logs python ranks_per_node
pause=1 status=$SILENT
while (( status == SILENT && ! stopping )); do
    # shellcheck disable=SC2016  # "$@" is for the shell on the node
    srun "${each_node[@]}" "${srun_options[@]}" "--output=${logs//%/%%}/node-%N.log" \
        bash -c "set -uo pipefail; $(declare -f wait_for on_node); on_node" 2>"$logs/srun.err" &
    step=$!
    helper watchdog
    guard=$!
    status=0
    wait_for "$step" || status=$?
    step=''
    for group in $guard $patience; do end_helper "$group"; done
    answered srun "$status" "$logs/srun.err" || status=$?
    if (( status == SILENT )); then rest; else cat "$logs/srun.err" >&2; fi
done
finish "$status"

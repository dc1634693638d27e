#!/usr/bin/env bash
# A real Slurm of two nodes on this machine, without root, for as long as one command runs. From the root:
#
#   bash chapter8-distributed-ai-training-in-action/code/slurm/local_slurm.sh              # a shell in it
#   bash chapter8-distributed-ai-training-in-action/code/slurm/local_slurm.sh sinfo        # one command
#
# Inside, sinfo, sbatch, squeue and scancel are those of Slurm. Two more, for faults:
#
#   bash chapter8-distributed-ai-training-in-action/code/slurm/local_slurm.sh --kill 127.0.0.2
#   bash chapter8-distributed-ai-training-in-action/code/slurm/local_slurm.sh --revive 127.0.0.2
#
# Each node is a slurmd of its own. The nodes are called by addresses, which need no name server, and
# claim 16 CPUs each; they have no GPUs. Jobs in the partition "urgent" preempt those in "all".
set -euo pipefail

start_node() {
    cd "$folder" # a step's slurmstepd hides its environment; this is how it is found
    setsid slurmd -D -N "$1" >>"$folder/$1.log" 2>&1 </dev/null &
    disown
}

having() { # the processes with this line in their environment
    env -u SLURM_CONF grep -lzsx "$1" /proc/[0-9]*/environ | cut -d/ -f3 | sort || true
}

ours() { # those of this cluster: daemons, jobs, what a job has left
    {
        having "SLURM_CONF=$SLURM_CONF"
        find /proc -maxdepth 2 -name cwd -lname "$folder" 2>/dev/null | cut -d/ -f3
    } | sort -u || true
}

kill_node() { # slurmd, the tasks, and the slurmstepd above them: nobody is left to say goodbye
    local tasks step steps=()
    tasks=$(comm -12 <(ours) <(having "SLURMD_NODENAME=$1"))
    for step in $(pgrep -x slurmstepd || true); do
        if pgrep -P "$step" | grep -qxF "$tasks"; then steps+=("$step"); fi
    done
    # shellcheck disable=SC2086 # a word for each process
    kill -KILL "$(<"$folder/$1.pid")" "${steps[@]}" $tasks
}

if [[ ${1:-} == --kill || ${1:-} == --revive ]]; then
    : "${LOCAL_SLURM:?is not set: type this inside of local_slurm.sh}" "${2:?name a node: 127.0.0.2}"
    folder=$LOCAL_SLURM
    if [[ ! -d $folder/$2 ]]; then
        echo "there is no node $2: 127.0.0.1 or 127.0.0.2" >&2
        exit 2
    fi
    if [[ $1 == --kill ]]; then kill_node "$2"; else start_node "$2"; fi
    exit
fi

unset "${!SLURM@}" "${!SBATCH@}" "${!SRUN@}" # of a Slurm that this may run in
export PATH=$PATH:/usr/sbin:/sbin
for program in munged slurmctld slurmd sbatch; do
    if ! command -v "$program" >/dev/null; then
        echo "needs Slurm: apt-get install slurm-wlm munge" >&2
        exit 2
    fi
done
folder=$(mktemp -d)
export LOCAL_SLURM=$folder SLURM_CONF=$folder/slurm.conf
user=$(id -un)
host=$(hostname)
read -r -a ports < <(python3 -c '
import socket
sockets = [socket.create_server(("", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in sockets))')
mkdir "$folder/state" "$folder/127.0.0.1" "$folder/127.0.0.2"
cat >"$SLURM_CONF" <<END
ClusterName=book
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=10 # seconds until a node that does not answer is down; 300 by default
KillWait=10 # seconds from SIGTERM to SIGKILL; 30 by default
SlurmdParameters=config_overrides # believe the next lines
ReturnToService=2 # a node that comes back is used again
NodeName=127.0.0.1 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=16
NodeName=127.0.0.2 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=16
PartitionName=all Nodes=ALL Default=YES MaxTime=4:00:00 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=4:00:00 PriorityTier=2 PreemptMode=OFF
END
echo "CgroupPlugin=cgroup/v1" >"$folder/cgroup.conf" # does nothing until it is asked to
(umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")

stop_all() {
    local left
    cd /
    export -n SLURM_CONF # or the loop below finds its own find, cut and sort, again and again
    while left=$(ours) && [[ $left ]]; do # until no daemon is left that could start one more
        # shellcheck disable=SC2086 # a word for each process
        kill -KILL $left 2>/dev/null || true
        sleep 0.1
    done
    rm -rf "$folder"
}
trap stop_all EXIT

wait_until() { # no more than 30 s, for a command that then succeeds
    local tries
    for ((tries = 0; tries < 300; tries++)); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.1
    done
    tail -n 5 "$folder"/*.log >&2
    echo "no cluster after 30 s" >&2
    exit 1
}

here=$PWD
cd "$folder"
setsid munged --foreground --force --num-threads=2 --key-file=munge.key --socket="$folder/munge.socket" \
    --log-file=munge.log --pid-file=munge.pid --seed-file=munge.seed >munged.out 2>&1 </dev/null &
disown
wait_until test -S munge.socket
setsid slurmctld -D >slurmctld.log 2>&1 </dev/null &
disown
start_node 127.0.0.1
start_node 127.0.0.2
both_idle() { [[ $(sinfo --noheader --partition=all --states=idle --format=%D) == 2 ]]; }
wait_until both_idle
cd "$here"
if (($#)); then
    "$@"
else
    echo "two idle nodes: try sinfo; exit ends the cluster and its jobs"
    "${SHELL:-bash}"
fi

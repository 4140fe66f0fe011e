"""Configuration files of a development cluster: slurm.conf, gres.conf with the GPUs' device files, slurmdbd.conf."""

import os
import socket

from slurm.devcluster.cluster import DevCluster

# Jobs of URGENT preempt the others: those of PARTITION are requeued, those of SPOT, which is hidden, are cancelled.
PARTITION, URGENT, SPOT = "main", "urgent", "spot"
NULL_DEVICE = (1, 3)  # major and minor number of /dev/null, the device of each simulated GPU

SLURM_CONF = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[controller]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
# The job ids of two clusters differ, since the rendezvous port of a job's ranks is derived from its id.
FirstJobId={ports[controller]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/logs/slurmctld.log
SlurmdLogFile={folder}/logs/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
MaxArraySize=1001
MaxJobCount=20000
KillWait=5
MinJobAge=300
ReturnToService=2
SlurmdTimeout=20
UnkillableStepTimeout=30
{accounting}
{nodes}
PartitionName={partition} Nodes=ALL Default=YES MaxTime=1-0 PriorityTier=1 State=UP
PartitionName={urgent} Nodes=ALL MaxTime=1-0 PriorityTier=10 State=UP
PartitionName={spot} Nodes=ALL MaxTime=1-0 PriorityTier=1 PreemptMode=CANCEL Hidden=YES State=UP
"""

ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[accounting]}
AccountingStoragePass={folder}/munge.socket"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdPort={ports[accounting]}
SlurmUser=root
LogFile={folder}/logs/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports[database]}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
"""


def write(cluster: DevCluster) -> None:
    """Write the configuration files and create the device files of the GPUs."""
    folder, ports = cluster.folder, cluster.ports
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    gres = f" Gres=gpu:b200:{cluster.gpus_per_node}" if cluster.gpus_per_node else ""
    nodes = [
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[name]} "
        f"CPUs=16 RealMemory={memory}{gres} State=UNKNOWN"
        for name in cluster.names
    ]
    values = {
        "folder": folder,
        "ports": ports,
        "name": f"dev{ports['controller']}",
        "host": socket.gethostname(),
        "accounting": ACCOUNTING.format(folder=folder, ports=ports) if cluster.accounting else "",
        "nodes": "\n".join(nodes),
        "partition": PARTITION,
        "urgent": URGENT,
        "spot": SPOT,
    }
    (folder / "slurm.conf").write_text(SLURM_CONF.format(**values))
    devices = []
    for index in range(cluster.gpus_per_node):
        device = folder / "devices" / f"gpu{index}"
        if not device.exists():
            os.mknod(device, 0o666 | 0o020000, os.makedev(*NULL_DEVICE))
        devices.append(f"Name=gpu Type=b200 File={device}\n")
    (folder / "gres.conf").write_text("".join(devices))
    if cluster.accounting:
        configuration = folder / "slurmdbd.conf"
        configuration.touch(mode=0o600)
        configuration.write_text(SLURMDBD_CONF.format(**values))

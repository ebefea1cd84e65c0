//! The command-line arguments and their help texts.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum, ValueHint};
use envelog::{Durability, Position, ProbeMode, crypto::HashAlg, inspect::Compression};
use serde::{Deserialize, Serialize};
use tracing_subscriber::filter::Targets;

use crate::{
    lines::LongLines,
    settings::{SWITCH, StoreSettings},
    values::{age, bytes, position, seconds, switch, time},
};

const EXAMPLES: &str = "\
Examples:
  envelog demo /var/log/syslog
  envelog create shop/orders --encrypt-conf '{\"enable\": true, \"encrypt_type\": \"default\"}'
  journalctl -f | envelog append shop/orders -
  envelog read shop/orders --from 2026-01-31T00:00:00Z --format json | jq .contents
  envelog verify --json

Exit status:
  0 done   1 other error   2 usage   3 key revoked   4 KMS unreachable
  5 corruption, tampering or rollback found   6 configuration refused
  7 store locked, missing or taken over; keyring or anchor missing or not the store's
  130 interrupted by a signal";

#[derive(Debug, Parser)]
#[command(name = "envelog", version, about = "Encrypted, append-only log storage", after_help = EXAMPLES, arg_required_else_help = true, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that every command accepts. Each of them but `--settings` is a setting: the module
/// `settings` adds its environment variable, and its place in a settings file.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// A file of settings, in TOML: the global options by name. An option of the command line
    /// precedes an environment variable, which precedes the file
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) settings: Option<PathBuf>,
    /// The directory of the store [default: ./envelog-data]
    #[arg(long, global = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) store: Option<PathBuf>,
    /// The service keyring [default: the store's path + ".keyring"]
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) keyring: Option<PathBuf>,
    /// The anchor: a directory on another volume that records how far the store is written. Once a
    /// store has an anchor, opening it for writing requires the anchor
    #[arg(long, global = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) anchor: Option<PathBuf>,
    /// Do not compare the store with its anchor. Opening it for writing with --anchor as well
    /// restarts the anchor from the store's current state
    #[arg(long, global = true, value_name = SWITCH, value_parser = switch)]
    pub(crate) without_anchor: Option<bool>,
    /// Accept data that a retired version of the service key authenticates, to read a backup that
    /// is known to be good
    #[arg(long, global = true, value_name = SWITCH, value_parser = switch)]
    pub(crate) accept_retired: Option<bool>,
    /// The directory of the embedded KMS [default: the store's path + ".kms"]
    #[arg(long, global = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) kms_dir: Option<PathBuf>,
    /// A KMS, such as local:DIR; may be given several times: the first that serves a key's region
    /// is used. The environment variable has one URL a line
    #[arg(long, global = true, value_name = "URL", value_delimiter = '\n')]
    pub(crate) kms: Vec<String>,
    /// A running service, such as https://logs.example.org: administrative commands act on its
    /// store, and not on --store
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) endpoint: Option<String>,
    /// The access key for --endpoint: a JSON file with id and secret, and mode 0600. Without it, the
    /// variables ENVELOG_ACCESS_KEY_ID and ENVELOG_ACCESS_KEY_SECRET have them
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) access_key: Option<PathBuf>,
    /// Trust the authorities in this PEM file for --endpoint, and not those of the system
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) ca: Option<PathBuf>,
    /// Print results and errors as JSON
    #[arg(long, global = true, value_name = SWITCH, value_parser = switch)]
    pub(crate) json: Option<bool>,
    /// Log to standard error; repeat for more detail, up to three times
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Log filter, such as info, or warn,envelog::keys=debug; replaces --verbose
    #[arg(long, global = true, value_name = "FILTER")]
    pub(crate) log: Option<Targets>,
    #[command(flatten)]
    pub(crate) of_store: StoreSettings,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Demonstrate encryption and revocation in one run, on the given files
    ///
    /// Creates a store with two Logstores: one under the service key with AES, one under a
    /// customer's key with SM4. Appends logs, reads them back and compares them, searches the store
    /// for plaintext, and verifies it. Then disables the customer's key and shows that every access
    /// to its Logstore is refused while the other Logstore works. Finally enables the key and reads
    /// again.
    #[command(after_help = "\
Examples:
  envelog demo
  envelog demo --dir ./look-inside access.log error.log")]
    Demo(DemoArgs),
    /// Create a Logstore; also creates the store and its keyring if they do not exist
    #[command(after_help = "\
Examples:
  envelog create shop/orders --shards 4 --ttl 30
  envelog create shop/orders --encrypt-conf '{\"enable\": true, \"encrypt_type\": \"sm4\"}'
  envelog create shop/orders --encrypt-conf '{\"enable\": true, \"encrypt_type\": \"default\",
    \"user_cmk_info\": {\"cmk_key_id\": \"key-…\", \"arn\": \"acs:ram::1:role/log\", \"region_id\": \"cn-hangzhou\"}}'")]
    Create(CreateArgs),
    /// Print the whole configuration of a Logstore as JSON
    #[command(after_help = "\
Example:
  envelog get shop/orders > orders.json")]
    Get(NameArgs),
    /// Replace the configuration of a Logstore with an edited copy of the output of `get`
    #[command(after_help = "\
Example:
  envelog get shop/orders | jq '.ttl_days = 7' | envelog update shop/orders --config -

An update based on an older revision is refused: run `get` again and edit the new output.")]
    Update(UpdateArgs),
    /// List the Logstores
    List,
    /// Delete a Logstore and its data
    #[command(after_help = "\
Example:
  envelog delete shop/orders --yes")]
    Delete(ConfirmedArgs),
    /// List the shards of a Logstore, with their hash ranges
    #[command(after_help = "\
Example:
  envelog shards shop/orders")]
    Shards(NameArgs),
    /// Split a shard: two new ones take its range, and it becomes read-only
    #[command(after_help = "\
Examples:
  envelog split shop/orders --shard 0
  envelog split shop/orders --shard 0 --key 40000000000000000000000000000000

The shard keeps its logs until retention drops them. Its number is not used again.")]
    Split(SplitArgs),
    /// Merge a shard with its right neighbour: a new one takes both ranges
    #[command(after_help = "\
Example:
  envelog merge shop/orders --shard 1

The two shards become read-only and keep their logs until retention drops them.")]
    Merge(MergeArgs),
    /// Append lines of files or of standard input, one log per line
    #[command(after_help = "\
SIGINT, SIGTERM and SIGHUP end it once the lines that were read are stored, with status 130; SIGTERM with status 0, unless a
line was cut. A second signal ends it at once, with status 130: lines that were not acknowledged may be stored or not.

Examples:
  envelog append shop/orders access.log error.log
  tail -F app.log | envelog append shop/orders - --ack")]
    Append(AppendArgs),
    /// Read logs
    #[command(after_help = "\
In JSON, a value that is not UTF-8 appears as {\"base64\": \"…\"}, and a key that is not as \"base64:…\".

Examples:
  envelog read shop/orders > orders.log
  envelog read shop/orders --shard 0 --from 17 --limit 10 --format json")]
    Read(ReadArgs),
    /// Print the last logs, and with -f new logs as they arrive
    #[command(after_help = "\
Logs among them that are lost, damaged or shredded are passed over. They are named on standard error, and the status is 0.

Examples:
  envelog tail shop/orders -n 100
  envelog tail shop/orders -f | grep ERROR")]
    Tail(TailArgs),
    /// Show keys, leases, segments and sizes
    #[command(after_help = "\
Examples:
  envelog status
  envelog status shop/orders --json | jq '.logstores[].key.state'")]
    Status(OptionalNameArgs),
    /// Look for everything about the store that needs an action, and say what to do
    ///
    /// Looks at the store, its keyring, the clock, the free space, the permissions, the KMSs, the anchor
    /// and the backup. Changes nothing, and works beside a writer. Ends with status 1 if a finding needs
    /// an action.
    #[command(after_help = "\
Examples:
  envelog doctor
  envelog doctor --backup /backup/logs
  envelog doctor --json | jq '.findings[] | select(.action)'")]
    Doctor(DoctorArgs),
    /// Check every block of the store, or of one Logstore
    #[command(after_help = "\
Examples:
  envelog verify
  envelog verify shop/orders --keyless
  envelog verify --against /backup/checkpoint
  envelog verify --anchor /mnt/other/anchors")]
    Verify(VerifyArgs),
    /// Record how far every shard is written, for a later `verify --against`
    #[command(after_help = "\
Keep the file away from the store: `verify --against FILE` detects that the store was rolled back to an older state.

It reads no logs. If a segment is missing, or the last one of a shard is damaged, it writes the file all the same, names the
Logstore, and ends with status 5.

Example:
  envelog checkpoint --out /backup/checkpoint")]
    Checkpoint(OutArgs),
    /// Show the header, blocks and footer of one segment file, without any key
    #[command(after_help = "\
Example:
  envelog inspect envelog-data/logstores/*/shard-0000/0000000001-00000000000000000000-0000000001.seg")]
    Inspect(InspectArgs),
    /// Accept the loss of missing or damaged files, so that the rest can be read and written again
    #[command(after_help = "\
`verify` reports the damage and its place, and `read --skip-lost` shows what can be read. `repair` records the loss of each
missing or damaged segment in the catalogue and the key audit log. From then on the shard is read past the loss, and `status`
and `verify` keep naming it. If the segment that was being written is damaged, `repair` keeps every block that can be read.
An acceptance is permanent. If there is a backup, restore it first.

Without a Logstore it repairs every shard, the key audit log and the probes. --give-up deletes a Logstore whose metadata is
lost, both the file and its second copy.

Examples:
  envelog repair shop/orders --shard 0 --yes
  envelog repair --yes
  envelog repair --give-up shop/orders --yes")]
    Repair(RepairArgs),
    /// Drop the segments that are over the age or the size limit of their Logstore
    #[command(after_help = "\
A service applies retention every --retention-every, and each command that has the store open for writing applies it when
it is due. `retain` applies it now.

While the clock is more than 24 h ahead of the last trusted time, nothing is dropped by age until the clock has advanced
by --clock-settle. With --trust-clock the clock is trusted as it is now.

Examples:
  envelog retain
  envelog retain --trust-clock --json | jq .segments")]
    Retain(RetainArgs),
    /// Copy the store to a directory while it is written, or bring the copy there up to date
    #[command(after_help = "\
The backup is a store itself: `envelog --store DIR --keyring FILE verify` checks it. It has every log that was durable when
the command began. The command takes no lock and writes nothing into the store. A later run into the same directory copies
only new segments. The keyring is not in the backup: copy it with `keys backup`, and keep it elsewhere.

Where the file system can, sealed segments are shared with the store, as reflinks or hard links. That protects from the
removal of a file, not from one that is overwritten in place, nor from the loss of the disk: back up to another disk, or copy
the directory there.

A store that does not continue the backup, because it was put back to an older state, is refused: use another directory.

Deletion, retention and `keys shred` do not reach a backup: its files stay until --prune.

Examples:
  envelog backup /mnt/backup/data
  envelog backup /mnt/backup/data --prune --json | jq .bytes_copied")]
    Backup(BackupArgs),
    /// Restore a backup to the directory of the store, which must be empty or absent
    #[command(after_help = "\
The keyring must be in its place. Each shard continues with sequence numbers that the lost store has not used: a reader that
has come further there finds that its position is above the end. With --until, each shard ends in front of its first block
with a log that was received later. Configurations and keys are those of the backup. The restored store is verified.

A store with an anchor opens after a restore with `--without-anchor --anchor DIR`, which starts the anchor again.

Examples:
  envelog --store /srv/envelog/data restore /mnt/backup/data
  envelog restore /mnt/backup/data --until 2026-01-31T12:00:00Z")]
    Restore(RestoreArgs),
    /// Serve the store to the SDKs of Alibaba Cloud SLS
    #[cfg(feature = "serve")]
    #[command(after_help = "\
Creates the store and its keyring if they do not exist. Without --access-keys, it listens on loopback addresses only, and
every program on the machine may do everything. docs/service.md describes the file of access keys and the API.

Examples:
  envelog serve --listen 127.0.0.1:8099
  envelog serve --listen 0.0.0.0:443 --access-keys keys.json --base-host logs.example.org --tls-cert chain.pem --tls-key key.pem")]
    Serve(ServeArgs),
    /// Rotate, re-wrap, replace, shred, back up and recover keys
    #[command(
        subcommand,
        after_help = "\
Examples:
  envelog keys rotate-data shop/orders
  envelog keys rotate-service && envelog keys backup --out /safe/keyring
  envelog keys audit --json | jq '.records[].event'
  envelog keys recover --without-keyring --expect keys.json"
    )]
    Keys(KeysCommand),
    /// Manage the embedded KMS: a directory that stands in for the customer's KMS
    #[command(
        subcommand,
        after_help = "\
Examples:
  envelog kms create-key --region cn-hangzhou --grant acs:ram::13234:role/logsource
  envelog kms list
  envelog kms disable key-0123456789abcdef"
    )]
    Kms(KmsCommand),
    /// Measure the speed of this machine
    #[command(after_help = "\
Examples:
  envelog bench /var/log/syslog --dir /mnt/data
  envelog bench --seconds 1 --json | jq '.rows[] | select(.what == \"append\")'
  envelog bench --serve --dir /mnt/data")]
    Bench(BenchArgs),
    /// Show the settings in force, and where each comes from
    #[command(after_help = "\
Examples:
  envelog --settings /etc/envelog/settings.toml settings
  envelog settings --json | jq '.settings[] | select(.source != \"default\")'")]
    Settings,
    /// Print the completion script of a shell
    #[command(after_help = "\
Examples:
  envelog completions bash > ~/.local/share/bash-completion/completions/envelog
  envelog completions fish > ~/.config/fish/completions/envelog.fish")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages, one for each command
    #[command(after_help = "\
Example:
  envelog man /usr/local/share/man/man1")]
    Man {
        /// An existing directory
        #[arg(value_hint = ValueHint::DirPath)]
        dir: PathBuf,
    },
}

impl Command {
    /// Whether the command serves others until it is stopped.
    pub(crate) fn is_service(&self) -> bool {
        #[cfg(feature = "serve")]
        return matches!(self, Self::Serve(_));
        #[cfg(not(feature = "serve"))]
        false
    }
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Files of logs [default: a text built into the program]
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) files: Vec<PathBuf>,
    /// Create the store in this directory, which must be empty or absent [default: a temporary
    /// directory]
    #[arg(long, value_hint = ValueHint::DirPath)]
    pub(crate) dir: Option<PathBuf>,
}

/// The options of `serve`. Each is a setting too: in a settings file, in the table `serve`.
#[cfg(feature = "serve")]
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The address and the port to listen on; port 0 is any free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8099")]
    pub(crate) listen: std::net::SocketAddr,
    /// The access keys: a JSON file with mode 0600, which is read again when it changes
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) access_keys: Option<PathBuf>,
    /// The host name of the service; clients put the project in front of it
    #[arg(long, value_name = "HOST", default_value = "sls.local")]
    pub(crate) base_host: String,
    /// The region that projects report
    #[arg(long, value_name = "REGION", default_value = "local")]
    pub(crate) region: String,
    /// The certificate chain for HTTPS, in PEM; read again when it changes
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The private key of the certificate, in PEM
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) tls_key: Option<PathBuf>,
    /// Allow plain HTTP on addresses other than loopback, where something in front of the service
    /// encrypts
    #[arg(long, value_name = SWITCH, value_parser = switch)]
    pub(crate) plain_http: Option<bool>,
    /// The directory below which `backup --endpoint` may make backups
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) backup_dir: Option<PathBuf>,
}

#[derive(Clone, Debug, Args, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NameArgs {
    /// The Logstore
    #[arg(value_name = "PROJECT/LOGSTORE")]
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct SplitArgs {
    /// The Logstore
    #[arg(value_name = "PROJECT/LOGSTORE")]
    pub(crate) name: String,
    /// The readwrite shard to split
    #[arg(long, value_name = "N")]
    pub(crate) shard: u32,
    /// The hash key, 32 hexadecimal digits, that the shard with the higher keys begins with
    /// [default: the middle of the range]
    #[arg(long, value_name = "KEY")]
    pub(crate) key: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct MergeArgs {
    /// The Logstore
    #[arg(value_name = "PROJECT/LOGSTORE")]
    pub(crate) name: String,
    /// The readwrite shard with the lower keys; it is merged with the one behind its range
    #[arg(long, value_name = "N")]
    pub(crate) shard: u32,
}

#[derive(Clone, Debug, Args, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OptionalNameArgs {
    /// The Logstore [default: all of them]
    #[arg(value_name = "PROJECT/LOGSTORE")]
    pub(crate) name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ConfirmedArgs {
    /// The Logstore
    #[arg(value_name = "PROJECT/LOGSTORE")]
    pub(crate) name: String,
    /// Confirm: this cannot be undone
    #[arg(long)]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The Logstore: letters, digits, - and _ in both parts
    #[arg(value_name = "PROJECT/LOGSTORE")]
    pub(crate) name: String,
    /// Number of shards
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) shards: u32,
    /// Drop whole segments after this many days [default: keep them]
    #[arg(long, value_name = "DAYS")]
    pub(crate) ttl: Option<u32>,
    /// Drop the oldest segments of a shard that holds more than this many bytes, such as 10GiB
    /// [default: no limit]
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) retention_bytes: Option<u64>,
    /// Rotate the data key automatically once the current version is this many days old [default:
    /// never]
    #[arg(long, value_name = "DAYS")]
    pub(crate) rotate_key_days: Option<u32>,
    /// Rotate the data key automatically once this many bytes are sealed under the current version
    /// [default: never]
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) rotate_key_bytes: Option<u64>,
    /// Block compression
    #[arg(long, value_enum, default_value_t = CompressionArg::Lz4)]
    pub(crate) compression: CompressionArg,
    /// The hash with which a segment's digest commits to the stored payloads
    #[arg(long, value_enum, default_value_t = HashArg::Sha256)]
    pub(crate) payload_hash: HashArg,
    /// Encryption, as JSON, or @FILE, or - for standard input
    #[arg(long, value_name = "JSON")]
    pub(crate) encrypt_conf: Option<OsString>,
    /// Which envelope renews the lease of the master key: a probe that all Logstores under the key
    /// share, or the Logstore's own. Choose `own` if the key policy is narrowed to single Logstores
    #[arg(long, value_enum, default_value_t = ProbeArg::Shared)]
    pub(crate) probe: ProbeArg,
    /// Wrap the keyring of a new store under this master key: a user_cmk_info, as JSON, or @FILE,
    /// or - for standard input
    #[arg(long, value_name = "JSON")]
    pub(crate) service_cmk: Option<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {
    /// The Logstore
    #[arg(value_name = "PROJECT/LOGSTORE")]
    pub(crate) name: String,
    /// The configuration, as JSON, or @FILE, or - for standard input
    #[arg(long, value_name = "JSON")]
    pub(crate) config: OsString,
}

#[derive(Debug, Args)]
pub(crate) struct AppendArgs {
    /// The Logstore
    #[arg(value_name = "PROJECT/LOGSTORE")]
    pub(crate) name: String,
    /// Files, or - for standard input [default: -]
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) files: Vec<PathBuf>,
    /// Append to this shard [default: each group to the next shard in turn]
    #[arg(long, value_name = "N")]
    pub(crate) shard: Option<u32>,
    /// When a group is acknowledged
    #[arg(long, value_enum, default_value_t = DurabilityArg::Synced)]
    pub(crate) durability: DurabilityArg,
    /// Close a group before it exceeds this many bytes, such as 65536 or 64KiB; a longer line gets
    /// its own group
    #[arg(long, value_name = "N", default_value = "64KiB", value_parser = bytes)]
    pub(crate) group_bytes: u64,
    /// What becomes of a line that is longer than a log may be (10 MiB)
    #[arg(long, value_name = "HOW", value_enum, default_value_t)]
    pub(crate) long_lines: LongLines,
    /// For each group that is appended, print the number of its last line, counted from 1 over all
    /// input
    #[arg(long)]
    pub(crate) ack: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ReadArgs {
    /// The Logstore
    #[arg(value_name = "PROJECT/LOGSTORE")]
    pub(crate) name: String,
    /// Read only this shard [default: all, one after another]
    #[arg(long, value_name = "N")]
    pub(crate) shard: Option<u32>,
    /// Where to begin: begin, end, a sequence number, or a receive time as RFC 3339 or as @ and the
    /// seconds since 1970
    #[arg(long, value_name = "POSITION", value_parser = position, default_value = "begin")]
    pub(crate) from: Position,
    /// Begin this long before now, such as 30m, 1h, 2d, 1w
    #[arg(long, value_name = "TIME", value_parser = age, conflicts_with = "from")]
    pub(crate) since: Option<Duration>,
    /// Where to stop (exclusive)
    #[arg(long, value_name = "POSITION", value_parser = position)]
    pub(crate) to: Option<Position>,
    /// Continue behind groups that are lost, damaged or shredded, and name them on standard error
    #[arg(long)]
    pub(crate) skip_lost: bool,
    /// Print at most this many logs
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<u64>,
    /// raw: each log's content and a newline; json: one object per log
    #[arg(long, value_enum)]
    pub(crate) format: Option<Format>,
}

#[derive(Debug, Args)]
pub(crate) struct TailArgs {
    /// The Logstore
    #[arg(value_name = "PROJECT/LOGSTORE")]
    pub(crate) name: String,
    /// Number of logs
    #[arg(short = 'n', long = "lines", value_name = "N", default_value_t = 10)]
    pub(crate) lines: usize,
    /// Wait for new logs; ends when the key is revoked
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only this shard [default: all]
    #[arg(long, value_name = "N")]
    pub(crate) shard: Option<u32>,
    /// raw: each log's content and a newline; json: one object per log
    #[arg(long, value_enum)]
    pub(crate) format: Option<Format>,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The Logstore [default: all of them]
    #[arg(value_name = "PROJECT/LOGSTORE")]
    pub(crate) name: Option<String>,
    /// Check everything that needs no key; works while a key is revoked
    #[arg(long)]
    pub(crate) keyless: bool,
    /// Compare with a file written by `checkpoint`
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) against: Option<PathBuf>,
}

#[derive(Clone, Debug, Args, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OutArgs {
    /// The file to write; it must not exist. Only its owner may read it
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A segment file
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// A directory with a backup of the store, to look at the age of the backup
    #[arg(long, value_name = "DIR")]
    pub(crate) backup: Option<PathBuf>,
    /// The greatest age of the backup
    #[arg(long, value_name = "DURATION", default_value = "25h", value_parser = age)]
    pub(crate) backup_age: Duration,
}

#[derive(Clone, Debug, Args, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RepairArgs {
    /// The Logstore; all of them, unless it is given
    #[arg(value_name = "PROJECT/LOGSTORE")]
    pub(crate) name: Option<String>,
    /// The shard
    #[arg(long, value_name = "N", requires = "name")]
    pub(crate) shard: Option<u32>,
    /// Delete the Logstore, whose metadata is lost
    #[arg(long, requires = "name", conflicts_with_all = ["shard", "accept_tampered"])]
    pub(crate) give_up: bool,
    /// Confirm: accept the loss of missing and damaged segments, and discard a damaged end
    #[arg(long)]
    pub(crate) yes: bool,
    /// Give up forged or exchanged files too
    #[arg(long)]
    pub(crate) accept_tampered: bool,
}

#[derive(Clone, Debug, Args, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RetainArgs {
    /// Trust the clock as it is now, although it is more than 24 h ahead of the last trusted time
    #[arg(long)]
    pub(crate) trust_clock: bool,
}

#[derive(Clone, Debug, Args, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BackupArgs {
    /// The directory of the backup: empty, absent, or with an earlier backup of this store
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
    /// Remove from the backup what the store has deleted: segments that retention dropped, deleted
    /// Logstores, and destroyed data keys
    #[arg(long)]
    pub(crate) prune: bool,
    /// Copy every byte, also where the file system can share sealed segments
    #[arg(long)]
    pub(crate) copy: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The directory of the backup
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
    /// Leave out the logs that were received after this time: RFC 3339, or @ and the seconds since
    /// 1970
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub(crate) until: Option<u64>,
    /// Copy every byte, also where the file system can share sealed segments
    #[arg(long)]
    pub(crate) copy: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Rotate the data key: new segments are sealed under a new version
    RotateData(NameArgs),
    /// Re-wrap the data keys under the newest version of the service key or of the customer's key
    #[command(after_help = "\
Without a name, the command skips Logstores whose data keys are already under the newest version. If a run was interrupted
or failed for some Logstores, the next run with the same options continues it, if it starts within a day. While a service
has the store open for writing, the service has to do this (`Keys::rewrap_all`).")]
    Rewrap(RewrapArgs),
    /// Show what every key is still needed for, and whether it may be destroyed
    Usage,
    /// Rotate the service key; back the keyring up again afterwards
    RotateService,
    /// Print the audit log of keys, verify it, or write it to a file
    #[command(after_help = "\
Examples:
  envelog keys audit --out audit.jsonl
  envelog keys audit --verify --against audit.jsonl")]
    Audit(AuditArgs),
    /// Copy the service keyring to a file
    Backup(OutArgs),
    /// Recover a store whose keyring is lost, as far as customers' keys allow
    #[command(after_help = "\
Without --expect, the command prints the master keys and roles that the store names, changes nothing and ends with status 6. Nothing in
the store authenticates them, so compare them with your own records before you put them into the file.

Example of the file:
  {\"shop/orders\": {\"cmk_key_id\": \"key-1f2e\", \"arn\": \"acs:ram::13234:role/logsource\", \"region_id\": \"cn-hangzhou\"}}")]
    Recover {
        /// Confirm: the keyring is lost, create a new one
        #[arg(long, required = true)]
        without_keyring: bool,
        /// The Logstores to recover: JSON of names and the user_cmk_info of each, from your own
        /// records
        #[arg(long, value_name = "FILE")]
        expect: Option<PathBuf>,
        /// Wrap the new keyring under this master key: a user_cmk_info, as JSON, or @FILE, or - for
        /// standard input
        #[arg(long, value_name = "JSON")]
        service_cmk: Option<OsString>,
    },
    /// Wrap the service keyring under another master key, or under none
    #[command(after_help = "\
The root keys in the keyring stay the same. Anyone who has a copy of the old file, and may use the master key that wraps
it, has the root keys. Make a new version with `keys rotate-service`, back the keyring up again, and destroy old copies.")]
    RewrapKeyring {
        /// The master key: a user_cmk_info, as JSON, or @FILE, or - for standard input
        #[arg(long, value_name = "JSON", required_unless_present = "plain")]
        service_cmk: Option<OsString>,
        /// Store the root keys in the file unwrapped, under no master key
        #[arg(long, conflicts_with = "service_cmk")]
        plain: bool,
    },
    /// Move a Logstore from one customer's key to another
    #[command(after_help = "\
Anyone who held the old key and a copy of an old envelope can still read the old data.")]
    ReplaceCmk {
        /// The Logstore
        #[arg(value_name = "PROJECT/LOGSTORE")]
        name: String,
        /// The encrypt_conf with the new user_cmk_info, as JSON, or @FILE, or - for standard input
        #[arg(long, value_name = "JSON")]
        encrypt_conf: OsString,
        /// Keep using the current data key instead of a new one
        #[arg(long)]
        keep_data_key: bool,
    },
    /// Destroy old data-key versions, and so the data that they sealed
    Shred {
        /// The Logstore
        #[arg(value_name = "PROJECT/LOGSTORE")]
        name: String,
        /// The version; may be given several times
        #[arg(long = "version", value_name = "N", required = true)]
        versions: Vec<u32>,
        /// Confirm: this cannot be undone
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct AuditArgs {
    /// Verify the audit log, and print only how far it is sound
    #[arg(long)]
    pub(crate) verify: bool,
    /// An earlier file of --out; its records must still be present and unchanged
    #[arg(long, value_name = "FILE", requires = "verify", value_hint = ValueHint::FilePath)]
    pub(crate) against: Option<PathBuf>,
    /// Write the audit log to this new file, as lines of JSON that can be checked without any key
    #[arg(long, value_name = "FILE", conflicts_with = "verify", value_hint = ValueHint::FilePath)]
    pub(crate) out: Option<PathBuf>,
}

#[derive(Clone, Debug, Args, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RewrapArgs {
    /// The Logstore [default: all of them]
    #[arg(value_name = "PROJECT/LOGSTORE", conflicts_with_all = ["cmk", "region", "restart"])]
    pub(crate) name: Option<String>,
    /// Only Logstores under this customer's key
    #[arg(long, value_name = "KEY-ID")]
    pub(crate) cmk: Option<String>,
    /// Only Logstores whose key is in this region
    #[arg(long, value_name = "REGION")]
    pub(crate) region: Option<String>,
    /// Start over, even if an interrupted run could be continued
    #[arg(long)]
    pub(crate) restart: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KmsCommand {
    /// Create a key and print its id
    CreateKey {
        /// The region of the key, such as cn-hangzhou
        #[arg(long, value_name = "REGION")]
        region: String,
        /// A role that may use the key, such as acs:ram::13234:role/logsource; may be given several
        /// times
        #[arg(long, value_name = "ARN")]
        grant: Vec<String>,
    },
    /// List the keys
    List,
    /// Refuse all use of a key until it is enabled again
    Disable(KeyArgs),
    /// Allow the use of a key again
    Enable(KeyArgs),
    /// Add a version to a key; older versions still unwrap
    Rotate(KeyArgs),
    /// Schedule the deletion of a key, and refuse its use until then
    ScheduleDeletion {
        #[command(flatten)]
        key: KeyArgs,
        /// Number of days until the deletion
        #[arg(long, value_name = "N", default_value_t = 7)]
        days: u32,
    },
    /// Cancel the scheduled deletion of a key
    CancelDeletion(KeyArgs),
    /// Delete a key now: everything wrapped under it is lost
    Delete {
        #[command(flatten)]
        key: KeyArgs,
        /// Not required: accepted because other deleting commands take it
        #[arg(long, hide = true)]
        yes: bool,
    },
    /// Let a role use a key
    Grant(GrantArgs),
    /// Revoke a role's use of a key
    Ungrant(GrantArgs),
}

#[derive(Debug, Args)]
pub(crate) struct KeyArgs {
    /// The key, as create-key printed it
    #[arg(value_name = "KEY")]
    pub(crate) key: String,
}

#[derive(Debug, Args)]
pub(crate) struct GrantArgs {
    /// The key, as create-key printed it
    #[arg(value_name = "KEY")]
    pub(crate) key: String,
    /// The role
    #[arg(value_name = "ARN")]
    pub(crate) arn: String,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Files of logs [default: generated lines]
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) files: Vec<PathBuf>,
    /// Where to create the stores: a directory on the disk to be measured [default: the directory
    /// for temporary files]
    #[arg(long, value_hint = ValueHint::DirPath)]
    pub(crate) dir: Option<PathBuf>,
    /// Time limit of each row, in seconds
    #[arg(long, value_name = "N", default_value_t = 2.0, value_parser = seconds)]
    pub(crate) seconds: f64,
    /// Measure only the cost of payload hashes for appends
    #[arg(long)]
    pub(crate) payload_hash: bool,
    /// Measure the log service over loopback, beside the engine alone
    #[cfg(feature = "serve")]
    #[arg(long, conflicts_with = "payload_hash")]
    pub(crate) serve: bool,
    /// Idle connections whose memory is measured
    #[cfg(feature = "serve")]
    #[arg(long, value_name = "N", default_value_t = 10_000, requires = "serve")]
    pub(crate) connections: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CompressionArg {
    Lz4,
    Zstd,
    None,
}

impl From<CompressionArg> for Compression {
    fn from(arg: CompressionArg) -> Self {
        match arg {
            CompressionArg::Lz4 => Compression::Lz4,
            CompressionArg::Zstd => Compression::Zstd,
            CompressionArg::None => Compression::None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProbeArg {
    Shared,
    Own,
}

impl From<ProbeArg> for ProbeMode {
    fn from(arg: ProbeArg) -> Self {
        match arg {
            ProbeArg::Shared => ProbeMode::Shared,
            ProbeArg::Own => ProbeMode::Own,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum HashArg {
    Sha256,
    Sm3,
}

impl From<HashArg> for HashAlg {
    fn from(arg: HashArg) -> Self {
        match arg {
            HashArg::Sha256 => HashAlg::Sha256,
            HashArg::Sm3 => HashAlg::Sm3,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DurabilityArg {
    /// In the memory of this process: lost when the process is killed
    Buffered,
    /// Written to the operating system: survives a kill of the process, not a crash of the system
    Written,
    /// Synced to the disk: survives a power loss
    Synced,
}

impl From<DurabilityArg> for Durability {
    fn from(arg: DurabilityArg) -> Self {
        match arg {
            DurabilityArg::Buffered => Durability::Buffered,
            DurabilityArg::Written => Durability::Written,
            DurabilityArg::Synced => Durability::Synced,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Raw,
    Json,
}

impl Format {
    /// The requested format, or else JSON with `--json` and raw without it.
    pub(crate) fn choose(asked: Option<Self>, json: bool) -> Self {
        asked.unwrap_or(if json { Format::Json } else { Format::Raw })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{collections::BTreeSet, fs, path::Path};

    use clap::{Command, CommandFactory};
    use serde_json::Value;

    use super::*;

    /// The commands without subcommands of their own, with their paths.
    fn leaves(command: &Command, path: &str, all: &mut BTreeSet<String>) {
        for child in command.get_subcommands() {
            leaves(child, &format!("{path}.{}", child.get_name()), all);
        }
        if !command.has_subcommands() {
            all.insert(path.to_owned());
        }
    }

    #[test]
    fn the_schema_defines_the_answer_of_every_command() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/admin.schema.json");
        let schema: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let defined = schema["$defs"].as_object().unwrap().keys();
        let defined: BTreeSet<String> =
            defined.filter(|name| name.starts_with("answer.")).cloned().collect();
        let mut commands = BTreeSet::new();
        leaves(&Cli::command(), "answer", &mut commands);
        if cfg!(not(feature = "serve")) {
            commands.insert("answer.serve".to_owned());
        }
        assert_eq!(defined, commands);
    }
}

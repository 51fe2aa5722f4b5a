//! The command line: what may be typed, and which command it is. Each command decides in pure functions where there is something to
//! decide, and ends with an exit code that scripts rely on (see [`exit`]).
//!
//! What programs read goes to standard output; what people are told on the way goes to standard error.

mod apply;
mod ask;
mod connect;
pub mod demo;
mod events;
mod exit;
mod lost;
mod maintenance;
mod output;
mod privileges;
mod read;
mod reinit;
mod restart;
pub mod run;
mod secret_files;
mod status;
mod switchover;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::types::{ClusterName, MemberName};
use exit::{DONE, Failure, Outcome, WRONG};

/// Keeps a PostgreSQL cluster the way its spec says
#[derive(Debug, Parser)]
#[command(name = "pgherd", version, arg_required_else_help = true, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 failed; 2 wrong use or invalid document; 3 etcd cannot be reached; 4 refused; 6 still running when --timeout passed; \
7 the daemon stays down after repeated crashes.";

/// Where etcd is, and which cluster is meant. An option wins over the node document, a node document named here over the environment
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Connection")]
pub struct Connection {
    /// Node document to take etcd, prefix and cluster from [default: /etc/pgherd/node.yaml]
    #[arg(long, global = true, value_name = "NODE.yaml")]
    config: Option<PathBuf>,
    /// etcd's client URLs, separated by commas [env: PGHERD_ENDPOINTS]
    #[arg(long, global = true, value_name = "URL,…", value_delimiter = ',')]
    endpoints: Vec<String>,
    /// First part of every key in etcd [env: PGHERD_PREFIX] [default: /pgherd]
    #[arg(long, global = true)]
    prefix: Option<String>,
    /// The cluster [env: PGHERD_CLUSTER]
    #[arg(long, global = true, value_name = "NAME")]
    cluster: Option<ClusterName>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Be the daemon of this host, in the foreground
    Run {
        /// Start although the daemon crashed repeatedly (exit code 7)
        #[arg(long)]
        clear_crashes: bool,
    },
    /// Initialize the cluster on a member although not every member has reported an empty data directory
    Bootstrap {
        /// The member that runs initdb
        #[arg(long, value_name = "MEMBER")]
        on: MemberName,
        #[command(flatten)]
        how: Asking,
    },
    /// Put a cluster document in force
    Apply {
        /// The document; - is standard input
        #[arg(short, long, value_name = "CLUSTER.yaml")]
        file: PathBuf,
        /// Say what would happen, and write nothing
        #[arg(long)]
        dry_run: bool,
        /// Only if this generation is in force; 0 = only if none is
        #[arg(long, value_name = "N")]
        generation: Option<u64>,
    },
    /// Print the cluster document in force, as typed; or what members had written and nobody else has
    Get {
        /// What to print
        #[arg(value_enum, default_value_t = Thing::Spec)]
        what: Thing,
        /// An older document: the last 20 are kept
        #[arg(long, value_name = "N")]
        generation: Option<u64>,
        #[command(flatten)]
        format: Format,
    },
    /// Check documents of either kind, without etcd
    Validate {
        /// The documents; - is standard input
        #[arg(short, long = "file", value_name = "FILE", num_args = 1.., required = true)]
        files: Vec<PathBuf>,
    },
    /// Print the JSON Schema of a kind of document
    Schema {
        /// Which kind
        kind: DocumentKind,
    },
    /// Show members, roles, positions, and in words what is wrong
    Status {
        #[command(flatten)]
        format: Format,
        /// Exit with 1 when the cluster is not ready
        #[arg(long)]
        check: bool,
        /// Again and again, every so many seconds
        #[arg(short, long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = clap::value_parser!(u64).range(1..=3600))]
        watch: Option<u64>,
    },
    /// Hand the primary's part over to another member, and wait until it is done
    Switchover {
        #[command(flatten)]
        wanted: switchover::Wanted,
        #[command(flatten)]
        how: Asking,
    },
    /// Have a member lead although WAL may be lost, when there is no leader
    Failover {
        /// The member that is to lead
        #[arg(long, value_name = "MEMBER")]
        to: MemberName,
        /// Do not ask, and accept what is lost: at most what the command would have named
        #[arg(long)]
        accept_loss: bool,
        /// How long to wait for the end, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
        timeout: u64,
    },
    /// Set maintenance mode: nobody is elected, and nothing is started, stopped or copied until `resume`
    Pause {
        #[command(flatten)]
        wanted: maintenance::Wanted,
        #[command(flatten)]
        how: Asking,
    },
    /// End maintenance mode, and wait until all who have to have heard of it
    Resume {
        /// Do not wait for members that are lost: name what is risked, and ask
        #[arg(long)]
        insist: bool,
        #[command(flatten)]
        how: Asking,
    },
    /// Start PostgreSQL of members again, one after the other: standbys first, the primary last
    Restart {
        #[command(flatten)]
        wanted: restart::Wanted,
        #[command(flatten)]
        how: Asking,
    },
    /// Have members read secrets again, write PostgreSQL's files again and have it read them, one after the other
    Reload {
        #[command(flatten)]
        whom: restart::Whom,
        #[command(flatten)]
        how: Asking,
    },
    /// Take back what was scheduled or asked for and has not begun
    Flush {
        /// What
        #[arg(value_enum)]
        what: restart::Flushed,
        /// Restarts of these members only
        #[arg(value_name = "MEMBER")]
        members: Vec<MemberName>,
        /// Do not ask for confirmation
        #[arg(long)]
        yes: bool,
    },
    /// Throw a member's data directory away and copy it anew; returns when the member has taken it up
    Reinit {
        #[command(flatten)]
        wanted: reinit::Wanted,
    },
    /// List the last decisions, oldest first
    Events {
        #[command(flatten)]
        format: Format,
        /// How many
        #[arg(short = 'n', long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
        limit: u32,
    },
    /// A cluster on this machine's loopback, to look at and to break
    Demo(demo::DemoArgs),
    /// Print the version
    Version,
}

/// How a request to the cluster is made.
#[derive(Debug, Clone, Copy, Args)]
struct Asking {
    /// Do not ask for confirmation
    #[arg(long)]
    yes: bool,
    /// How long to wait for the end, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
}

impl Asking {
    fn timeout(self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

/// What comes out.
#[derive(Debug, Clone, Copy, Args)]
struct Format {
    /// A table for people, JSON for programs
    #[arg(short, long, value_enum, default_value_t = OutputFormat::Table)]
    output: OutputFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OutputFormat {
    Table,
    Json,
}

/// What `get` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Thing {
    /// The cluster document, as typed
    Spec,
    /// WAL that was taken away from a member because no other has it, as long as it is kept on its host
    LostWrites,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DocumentKind {
    Cluster,
    Node,
}

/// Does what the arguments say. Says on standard error why not.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(help) => {
            let _ = help.print();
            return ExitCode::from(if help.use_stderr() { WRONG } else { DONE });
        }
    };
    match dispatch(cli) {
        Ok(code) => ExitCode::from(code),
        Err(Failure { code, error }) => {
            output::tell(&format!("pgherd: {error:#}"));
            ExitCode::from(code)
        }
    }
}

fn dispatch(cli: Cli) -> Outcome {
    let connection = cli.connection;
    match cli.command {
        Command::Run { clear_crashes } => run::run(connection, clear_crashes),
        Command::Bootstrap { on, how } => ask::bootstrap(&connection, &on, how),
        Command::Apply { file, dry_run, generation } => apply::apply(&connection, &file, dry_run, generation),
        Command::Get { what: Thing::Spec, generation, .. } => apply::get(&connection, generation),
        Command::Get { what: Thing::LostWrites, format, .. } => lost::lost_writes(&connection, format.output),
        Command::Validate { files } => read::validate(&files),
        Command::Schema { kind } => read::schema(kind),
        Command::Status { format, check, watch } => status::status(&connection, format.output, check, watch.map(Duration::from_secs)),
        Command::Switchover { wanted, how } => switchover::switchover(&connection, wanted, how),
        Command::Failover { to, accept_loss, timeout } => switchover::failover(&connection, &to, Asking { yes: accept_loss, timeout }),
        Command::Pause { wanted, how } => maintenance::pause(&connection, &wanted, how),
        Command::Resume { insist, how } => maintenance::resume(&connection, insist, how),
        Command::Restart { wanted, how } => restart::restart(&connection, &wanted, how),
        Command::Reload { whom, how } => restart::reload(&connection, &whom, how),
        Command::Flush { what, members, yes } => restart::flush(&connection, what, &members, yes),
        Command::Reinit { wanted } => reinit::reinit(&connection, wanted),
        Command::Events { format, limit } => events::events(&connection, format.output, limit),
        Command::Demo(args) => Ok(if demo::run(&args)? { DONE } else { exit::FAILED }),
        Command::Version => output::print(&format!("pgherd {}\n", env!("CARGO_PKG_VERSION"))),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn connection_options_may_stand_before_or_after_the_command() {
        for line in ["pgherd --config n.yaml status -w", "pgherd status --config n.yaml --watch 5 -o json --check"] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.connection.config, Some(PathBuf::from("n.yaml")), "{line}");
            assert!(matches!(cli.command, Command::Status { watch: Some(_), .. }), "{line}");
        }
    }

    #[test]
    fn hostile_names_are_refused_before_anything_is_asked() {
        assert!(Cli::try_parse_from(["pgherd", "switchover", "--to", "../leader"]).is_err());
        assert!(Cli::try_parse_from(["pgherd", "status", "--cluster", "Main"]).is_err());
    }
}

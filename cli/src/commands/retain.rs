//! `retain`.

use envelog::admin::{RetainOptions, RetentionReport};

use crate::{args::RetainArgs, exit::Result, output, setup::Setup};

pub(crate) fn run(setup: &Setup, args: &RetainArgs) -> Result {
    let store = setup.open()?;
    let options = RetainOptions::default().trust_clock(args.trust_clock);
    let report = store.admin().retain(&options);
    // Close after a failure too: this records when retention was applied.
    let closed = setup.close(store);
    let report = report?;
    closed?;
    if setup.json { output::json(&report) } else { print(&report) }
}

fn print(report: &RetentionReport) -> Result {
    output::line(format_args!(
        "dropped {} segments, {} freed",
        output::count(report.segments),
        output::size(report.bytes)
    ))?;
    if report.suspended {
        output::line(SUSPENDED)?;
    }
    if report.left > 0 {
        let files = output::count(report.left);
        output::line(format_args!("{files} files could not be removed; the next run tries again"))?;
    }
    if report.data_keys > 0 {
        let keys = output::count(report.data_keys);
        output::line(format_args!("destroyed {keys} data-key versions without a segment"))?;
    }
    if report.data_keys_postponed > 0 {
        let logstores = output::count(report.data_keys_postponed);
        output::line(format_args!(
            "the data keys of {logstores} Logstores stay until their master keys can be used"
        ))?;
    }
    Ok(())
}

/// The line of `retain` and `status` about a suspension.
pub(super) const SUSPENDED: &str = "retention by age is suspended: the clock is more than 24 h ahead of the last trusted time; it resumes once the clock has advanced by --clock-settle, or with `envelog retain --trust-clock` if the clock is right";

//! The files of the page, and the headers that keep a browser from more than they need.

use bytes::Bytes;
use hyper::StatusCode;

use crate::response::{Answer, Chunks};

const PREFIX: &str = "/console";
const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Only files of this origin, no frame around the page, no form that is sent, and no text that
/// becomes markup or a script.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; \
                      form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

/// Path, media type, contents.
const FILES: [(&str, &str, &str); 9] = [
    ("", HTML, include_str!("../../console/index.html")),
    ("/console.css", CSS, include_str!("../../console/console.css")),
    ("/theme.js", SCRIPT, include_str!("../../console/theme.js")),
    ("/main.js", SCRIPT, include_str!("../../console/main.js")),
    ("/client.js", SCRIPT, include_str!("../../console/client.js")),
    ("/view.js", SCRIPT, include_str!("../../console/view.js")),
    ("/logstores.js", SCRIPT, include_str!("../../console/logstores.js")),
    ("/logstore.js", SCRIPT, include_str!("../../console/logstore.js")),
    ("/audit.js", SCRIPT, include_str!("../../console/audit.js")),
];

/// Whether a path is one of the console.
pub(crate) fn owns(path: &str) -> bool {
    path.strip_prefix(PREFIX).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// A file of the page. It contains no data, so it needs no signature.
pub(crate) fn file(path: &str, has_access_keys: bool) -> Option<Answer> {
    let path = path.strip_prefix(PREFIX)?;
    let path = if path == "/" { "" } else { path };
    let (_, kind, text) = FILES.iter().find(|(name, ..)| *name == path)?;
    let body = match *kind {
        HTML if !has_access_keys => {
            Bytes::from(text.replacen("data-access=\"keys\"", "data-access=\"open\"", 1))
        }
        _ => Bytes::from_static(text.as_bytes()),
    };
    let mut answer = Answer::of(Chunks::new([body]), kind);
    answer.status = StatusCode::OK;
    Some(guard(answer))
}

/// Adds the headers of the console to an answer, which may be an error.
pub(crate) fn guard(answer: Answer) -> Answer {
    answer
        .with("content-security-policy", POLICY)
        .with("x-content-type-options", "nosniff")
        .with("cache-control", "no-store")
        .with("referrer-policy", "no-referrer")
        .with("cross-origin-opener-policy", "same-origin")
        .with("cross-origin-resource-policy", "same-origin")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_console_owns_its_paths_alone() {
        for (path, expected) in [
            ("/console", true),
            ("/console/", true),
            ("/console/api/overview", true),
            ("/consoles", false),
            ("/", false),
            ("/logstores", false),
        ] {
            assert_eq!(owns(path), expected, "{path}");
        }
        assert!(file("/console", true).is_some() && file("/console/", true).is_some());
        assert!(file("/console/api/overview", true).is_none());
        assert!(file("/console/../keys.json", true).is_none());
    }

    #[test]
    fn the_files_refer_to_each_other_and_to_nothing_else() {
        for (name, _, text) in FILES {
            // The name space of SVG is no address that a browser opens.
            let text = text.replace("http://www.w3.org/2000/svg", "");
            for outside in ["http:", "https:", "//cdn", "@import", "url(", "innerHTML", "eval("] {
                assert!(!text.contains(outside), "{name}: {outside}");
            }
        }
        let html = FILES[0].2;
        assert_eq!(html.matches("data-access=\"keys\"").count(), 1);
        assert!(!html.contains("style=") && !html.contains(" onclick"));
    }
}

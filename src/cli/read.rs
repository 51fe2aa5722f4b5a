//! Documents on this host: reading them with a bound, `validate`, `schema`.
//!
//! `validate` says everything that `apply` and `run` would refuse, without asking etcd.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use anyhow::Context;

use crate::cli::DocumentKind;
use crate::cli::exit::{DONE, Failure, Outcome, WRONG};
use crate::cli::output::{print, tell};
use crate::cli::secret_files;
use crate::spec::{self, DOCUMENT_MAX_BYTES, Document, Severity, schema as json_schema, unbuilt};

/// The document's name for messages, and its text. `-` is standard input.
pub fn read_document(path: &Path) -> Result<(String, String), Failure> {
    let name = if path == Path::new("-") { "standard input".to_owned() } else { path.display().to_string() };
    let wrong = |error: anyhow::Error| Failure { code: WRONG, error };
    let mut bytes = Vec::new();
    let most = u64::try_from(DOCUMENT_MAX_BYTES).unwrap_or(u64::MAX);
    let read = if path == Path::new("-") {
        io::stdin().lock().take(most + 1).read_to_end(&mut bytes)
    } else {
        File::open(path).and_then(|file| file.take(most + 1).read_to_end(&mut bytes))
    };
    read.with_context(|| format!("reading {name}")).map_err(wrong)?;
    let text = String::from_utf8(bytes).with_context(|| format!("{name} is not text in UTF-8")).map_err(wrong)?;
    Ok((name, text))
}

/// `pgherd validate`.
pub fn validate(files: &[std::path::PathBuf]) -> Outcome {
    let mut code = DONE;
    for path in files {
        match read_document(path).and_then(|(name, text)| Ok((spec::load_any(&name, &text)?, name))) {
            Ok((document, name)) => valid(&document, &name)?,
            Err(failure) => {
                tell(&format!("{:#}", failure.error));
                code = code.max(failure.code);
            }
        }
    }
    Ok(code)
}

fn valid(document: &Document, name: &str) -> Result<(), Failure> {
    for warning in document.warnings() {
        tell(&warning.to_string());
    }
    let kind = match document {
        Document::Cluster(loaded) => {
            for refusal in unbuilt::refusals(&loaded.spec) {
                let message = format!("pgherd apply will refuse {}: {}", refusal.value, refusal.reason);
                tell(&loaded.problem(Severity::Warning, &refusal.path, message, None).to_string());
            }
            "cluster"
        }
        Document::Node(loaded) => {
            for refusal in unbuilt::node_refusals(&loaded.spec) {
                let message = format!("pgherd run will refuse this: {}", refusal.reason);
                tell(&loaded.problem(Severity::Warning, &refusal.path, message, None).to_string());
            }
            for problem in secret_files::problems(loaded, Severity::Warning) {
                tell(&problem.to_string());
            }
            "node"
        }
    };
    print(&format!("{name}: valid {kind} document\n")).map(|_| ())
}

/// `pgherd schema`.
pub fn schema(kind: DocumentKind) -> Outcome {
    let schema = match kind {
        DocumentKind::Cluster => json_schema::cluster(),
        DocumentKind::Node => json_schema::node(),
    };
    print(&json_schema::print(&schema))
}

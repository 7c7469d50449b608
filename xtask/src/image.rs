//! `cargo xtask image`: a container image without a container engine.
//!
//! The layout is OCI's (<https://github.com/opencontainers/image-spec>), with the file that
//! `docker load` looked for before it knew that layout. The same files give the same bytes.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{build, place, shell};

/// Pack the daemon into a container image
///
/// Builds the daemon with optimisations and the eBPF programs inside, and writes
/// TARGET/image/node-dataplane-VERSION-ARCH.tar, with nothing in it but the daemon and the C
/// library of this machine. Load it with `ctr -n k8s.io images import FILE`,
/// `docker load -i FILE` or `podman load -i FILE`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the image
    #[arg(long, value_name = "NAME", default_value = "node-dataplane")]
    name: String,
    /// Tag of the image [default: the version]
    #[arg(long, value_name = "TAG")]
    tag: Option<String>,
    /// File to write [default: TARGET/image/NAME-TAG-ARCH.tar]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

const PROGRAM: &str = "/usr/local/bin/proxy-daemon";

/// Runs the command.
///
/// # Errors
/// When something does not build, or the image cannot be written.
pub fn run(args: &Args) -> Result<ExitCode> {
    let program = build::release()?;
    let mut files = vec![File::read(PROGRAM, &program)?];
    for library in libraries(&program)? {
        let name = library.to_string_lossy().into_owned();
        files.push(File::read(&name, &library)?);
    }
    let tag = args.tag.as_deref().unwrap_or(env!("CARGO_PKG_VERSION"));
    let architecture = architecture()?;
    let image = image(&files, &format!("{}:{tag}", args.name), architecture)?;
    let out = args.out.clone().unwrap_or_else(|| {
        place::target().join(format!("image/{}-{tag}-{architecture}.tar", args.name))
    });
    if let Some(directory) = out.parent() {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    std::fs::write(&out, &image).with_context(|| format!("cannot write {}", out.display()))?;
    for file in &files {
        println!("{:>8.2} MiB  {}", mib(file.content.len()), file.name);
    }
    println!("{:>8.2} MiB  {}", mib(image.len()), out.display());
    Ok(ExitCode::SUCCESS)
}

#[allow(clippy::cast_precision_loss, reason = "for people")]
fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// As Go, and so OCI, calls it.
fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("no name is known for the architecture {other}"),
    }
}

/// A file of the image.
#[derive(Debug)]
struct File {
    /// From the root.
    name: String,
    content: Vec<u8>,
}

impl File {
    fn read(name: &str, from: &Path) -> Result<Self> {
        let content = std::fs::read(from).with_context(|| from.display().to_string())?;
        Ok(Self { name: name.to_owned(), content })
    }
}

/// The shared libraries that a program needs, with what loads them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let libraries = loaded(&shell::output(Command::new("ldd").arg(program))?)?;
    if libraries.is_empty() {
        bail!("ldd names no library of {}", program.display());
    }
    Ok(libraries)
}

/// Lines of ldd(1): `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)`, the loader without
/// an arrow, and `linux-vdso.so.1 (0x...)`, which is no file.
fn loaded(text: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for line in text.lines() {
        if line.contains("not found") {
            bail!("ldd: {}", line.trim());
        }
        let path = line.rsplit("=>").next().unwrap_or(line).split_whitespace().next();
        if let Some(path) = path.filter(|path| path.starts_with('/')) {
            found.push(PathBuf::from(path));
        }
    }
    found.sort();
    Ok(found)
}

/// The image as one tar file.
fn image(files: &[File], reference: &str, architecture: &str) -> Result<Vec<u8>> {
    let layer = layer(files)?;
    let mut packed = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    packed.write_all(&layer)?;
    let packed = packed.finish()?;
    let config = config(&digest(&layer), architecture).to_string();
    let blob = |media: &str, content: &[u8]| json!({"mediaType": media, "digest": digest(content), "size": content.len()});
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob("application/vnd.oci.image.config.v1+json", config.as_bytes()),
        "layers": [blob("application/vnd.oci.image.layer.v1.tar+gzip", &packed)],
    })
    .to_string();
    let mut entry = blob("application/vnd.oci.image.manifest.v1+json", manifest.as_bytes());
    let (_, tag) = reference.rsplit_once(':').unwrap_or_default();
    entry["annotations"] = json!({
        "io.containerd.image.name": familiar(reference),
        "org.opencontainers.image.ref.name": tag,
    });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry],
    });
    let for_docker = json!([{
        "Config": path(&digest(config.as_bytes())),
        "RepoTags": [reference],
        "Layers": [path(&digest(&packed))],
    }]);
    let mut archive = tar::Builder::new(Vec::new());
    let marker = json!({"imageLayoutVersion": "1.0.0"}).to_string();
    append(&mut archive, "oci-layout", marker.as_bytes(), 0o644)?;
    append(&mut archive, "index.json", index.to_string().as_bytes(), 0o644)?;
    append(&mut archive, "manifest.json", for_docker.to_string().as_bytes(), 0o644)?;
    for content in [config.as_bytes(), manifest.as_bytes(), packed.as_slice()] {
        append(&mut archive, &path(&digest(content)), content, 0o644)?;
    }
    Ok(archive.into_inner()?)
}

/// With the registry and path that container engines put before a bare name.
fn familiar(reference: &str) -> String {
    if reference.contains('/') {
        reference.to_owned()
    } else {
        format!("docker.io/library/{reference}")
    }
}

fn config(layer: &str, architecture: &str) -> Value {
    json!({
        "architecture": architecture,
        "os": "linux",
        "config": {
            // Capabilities that a pod is given reach root only.
            "User": "0:0",
            "Entrypoint": [PROGRAM],
            "Labels": {
                "org.opencontainers.image.title": "node-dataplane",
                "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
                "org.opencontainers.image.licenses": env!("CARGO_PKG_LICENSE"),
            },
        },
        "rootfs": {"type": "layers", "diff_ids": [layer]},
    })
}

fn layer(files: &[File]) -> Result<Vec<u8>> {
    let mut directories: Vec<String> = files
        .iter()
        .flat_map(|file| Path::new(&file.name).ancestors().skip(1))
        .filter(|directory| directory.parent().is_some())
        .map(|directory| directory.to_string_lossy().trim_start_matches('/').to_owned() + "/")
        .collect();
    directories.sort();
    directories.dedup();
    let mut archive = tar::Builder::new(Vec::new());
    for directory in &directories {
        let mut header = header(0, 0o755);
        header.set_entry_type(tar::EntryType::Directory);
        archive.append_data(&mut header, directory, std::io::empty())?;
    }
    for file in files {
        append(&mut archive, file.name.trim_start_matches('/'), &file.content, 0o755)?;
    }
    Ok(archive.into_inner()?)
}

fn append(
    archive: &mut tar::Builder<Vec<u8>>,
    name: &str,
    content: &[u8],
    mode: u32,
) -> Result<()> {
    let mut header = header(content.len() as u64, mode);
    Ok(archive.append_data(&mut header, name, content)?)
}

/// Without times and owners, which would differ from build to build.
fn header(size: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_size(size);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn digest(content: &[u8]) -> String {
    let hex: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// Of a blob, by its digest.
fn path(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read as _;

    use super::*;

    fn unpack(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().to_string_lossy().into_owned();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (name, content)
        });
        entries.collect()
    }

    fn files() -> Vec<File> {
        let file = |name: &str, content: &[u8]| File {
            name: name.to_owned(),
            content: content.to_owned(),
        };
        vec![file(PROGRAM, b"program"), file("/lib64/ld-linux-x86-64.so.2", b"loader")]
    }

    #[test]
    fn every_blob_is_where_its_digest_says_and_the_layer_holds_the_files() {
        let parts = unpack(&image(&files(), "node-dataplane:1.2", "amd64").unwrap());
        let json = |name: &str| serde_json::from_slice::<Value>(&parts[name]).unwrap();
        for (name, content) in parts.iter().filter(|(name, _)| name.starts_with("blobs/")) {
            assert_eq!(*name, path(&digest(content)));
        }
        let at = |digest: &Value| path(digest.as_str().unwrap());
        let entry = &json("index.json")["manifests"][0];
        assert_eq!(
            entry["annotations"]["io.containerd.image.name"],
            "docker.io/library/node-dataplane:1.2"
        );
        let manifest = json(&at(&entry["digest"]));
        let config = json(&at(&manifest["config"]["digest"]));
        assert_eq!(config["config"]["Entrypoint"], json!([PROGRAM]));
        let packed = &parts[&at(&manifest["layers"][0]["digest"])];
        assert_eq!(manifest["layers"][0]["size"], packed.len());
        let mut layer = Vec::new();
        flate2::read::GzDecoder::new(packed.as_slice()).read_to_end(&mut layer).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"], json!([digest(&layer)]));
        let layer = unpack(&layer);
        assert_eq!(layer["usr/local/bin/proxy-daemon"], b"program");
        assert_eq!(
            layer.keys().collect::<Vec<_>>(),
            [
                "lib64/",
                "lib64/ld-linux-x86-64.so.2",
                "usr/",
                "usr/local/",
                "usr/local/bin/",
                "usr/local/bin/proxy-daemon"
            ]
        );
        let docker = &json("manifest.json")[0];
        assert_eq!(docker["RepoTags"], json!(["node-dataplane:1.2"]));
        assert!(parts.contains_key(docker["Layers"][0].as_str().unwrap()));
    }

    #[test]
    fn the_same_files_give_the_same_bytes() {
        let make = || image(&files(), "node-dataplane:1.2", "amd64").unwrap();
        assert_eq!(make(), make());
    }

    #[test]
    fn ldd_names_libraries_and_what_is_missing() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\
            \tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f01)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f02)\n";
        let found = loaded(text).unwrap();
        let expected = ["/lib/x86_64-linux-gnu/libm.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(found, expected.map(PathBuf::from));
        assert!(loaded("\tlibx.so => not found\n").is_err());
    }
}

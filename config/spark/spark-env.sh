# Sourced by every Spark program of this checkout: set-up links pyspark's conf folder here.
# Keeps all that Spark writes on its own account inside the checkout, or below METERSTREAM_HOME.
_root="$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && cd ../.. && pwd -P)"
_home="${METERSTREAM_HOME:-$_root/data}"
case "$_home" in /*) ;; *) _home="$PWD/$_home" ;; esac
mkdir -p "$_home/tmp"

# Loopback, as the whole native stack; on a cluster set it to an address that the executors reach.
SPARK_LOCAL_IP="${SPARK_LOCAL_IP:-127.0.0.1}"
# In a container, which listens everywhere, its own name: executors in other containers must find this driver.
[ "${METERSTREAM_LISTEN:-}" = 0.0.0.0 ] && SPARK_LOCAL_HOSTNAME="${SPARK_LOCAL_HOSTNAME:-$(cat /etc/hostname)}"
SPARK_LOCAL_DIRS="${SPARK_LOCAL_DIRS:-$_home/tmp}"
_jvm="-Djava.io.tmpdir=$_home/tmp -XX:-UsePerfData"
SPARK_LAUNCHER_OPTS="$_jvm ${SPARK_LAUNCHER_OPTS:-}"
SPARK_SUBMIT_OPTS="$_jvm -Dspark.sql.warehouse.dir=$_home/spark-warehouse -Dderby.system.home=$_home/tmp ${SPARK_SUBMIT_OPTS:-}"

[ -x "$_root/.venv/bin/python" ] && PYSPARK_PYTHON="${PYSPARK_PYTHON:-$_root/.venv/bin/python}"
# Present only where set-up found no Java 17 or newer and brought one.
[ -x "$_root/.venv/java/bin/java" ] && JAVA_HOME="$_root/.venv/java"
unset _root _home _jvm
